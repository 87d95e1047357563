"""The SSD operators on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, has_large_shared_memory, processors, triton_unsupported

MAX_HEAD_DIM, MAX_STATES = 128, 128
DECAY_HEADS = 8  # of a program of the kernel that computes the decays
DECAY_WARPS = 4
GATE_BLOCK = 1024
SEGMENT_BLOCK = 512
PROGRAMS_PER_PROCESSOR = 2  # that walk through time
PARTS_PER_PROCESSOR = 2  # programs of `gradients_kernel`, wanted at least
MIN_SEGMENT_CHUNKS = 8


class Shape(NamedTuple):
    """How a kernel divides its work."""

    chunk: int  # positions
    head_dim: int  # channels of a head in a program, at most
    states: int  # in a program, at most
    warps: int
    stages: int  # of what a loop reads, on their way from memory


# For heads of up to 64 x 128 states of 16 bits; see `_shapes` for others. The chunk of STATES is that of GRADIENTS.
FORWARD = Shape(chunk=64, head_dim=64, states=128, warps=4, stages=2)
STATES = Shape(chunk=64, head_dim=64, states=128, warps=4, stages=3)
GRADIENTS = Shape(chunk=64, head_dim=128, states=128, warps=8, stages=3)
MAX_STATE_FP32 = 64 * 128  # numbers of a state of one head, for fp32 activations


class Shapes(NamedTuple):
    """Those of one call."""

    forward: Shape
    states: Shape
    gradients: Shape


class Outputs(NamedTuple):
    """Where gradients go: of any strides along batch and length; B and C of equal ones, x, B and C of one dtype."""

    x: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor


def _shapes(x: Tensor, B: Tensor) -> Shapes:
    """Smaller tiles where those of the table would not fit into shared memory."""
    state, fp32 = _block(x.shape[3]) * _block(B.shape[3]), x.dtype == torch.float32
    forward, states, gradients = FORWARD, STATES, GRADIENTS
    if fp32:
        forward = forward._replace(chunk=min(32, forward.chunk), head_dim=32, stages=1)
        states = states._replace(states=64, stages=1)
    if not has_large_shared_memory(x.device.index):
        gradients = gradients._replace(stages=2)
    if fp32 or state > 64 * 128:
        gradients = gradients._replace(chunk=min(32, gradients.chunk), stages=1)
    return Shapes(forward, states, gradients)


def unsupported(x: Tensor, B: Tensor, dt_min: float) -> str | None:
    """Why the kernels cannot run on these inputs, None when they can."""
    if dt_min < 0:
        return "dt_limit lets Δ be negative"
    if x.dtype == torch.float32 and _block(x.shape[3]) * _block(B.shape[3]) > MAX_STATE_FP32:
        return f"states of {x.shape[3]} x {B.shape[3]} numbers in fp32 are too large"
    if x.shape[3] > MAX_HEAD_DIM:
        return f"heads of {x.shape[3]} channels are wider than {MAX_HEAD_DIM}"
    if B.shape[3] > MAX_STATES:
        return f"{B.shape[3]} states are more than {MAX_STATES}"
    return triton_unsupported(x)


def fake(
    x: Tensor, B: Tensor, z: Tensor | None, initial_state: Tensor | None, for_backward: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, without values."""
    state = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    starts = (1, *state) if for_backward and initial_state is not None else (0,)
    ungated = x.new_empty(x.shape if for_backward and z is not None else (0,))
    return (
        x.new_empty(x.shape),
        x.new_empty(state, dtype=torch.float32),
        x.new_empty(starts, dtype=torch.float32),
        ungated,
    )


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's forward: y, the final state, the initial one if the backward needs it, y before the gate.

    `chunk_size` is what the reference works with; here the kernels have their own.
    """
    from kernels.ssd.triton_kernels import forward_kernel

    (batch, length, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    x, B, C, z = (_unit(t, x.dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    D, initial_state = (None if t is None else t.contiguous() for t in (D, initial_state))
    y = torch.empty((batch, length, heads, head_dim), dtype=x.dtype, device=x.device)
    ungated = torch.empty_like(y) if for_backward and z is not None else None
    final_state = torch.empty((batch, heads, head_dim, states), dtype=torch.float32, device=x.device)
    initial = None if initial_state is None else initial_state.float()
    shape, exact = _shapes(x, B).forward, x.dtype == torch.float32
    p, n = min(shape.head_dim, _block(head_dim)), _block(states)
    chunks = -(-length // shape.chunk)
    segments = _segments(batch * heads, chunks, x.device)
    segment_chunks = -(-chunks // segments)
    align = alignment(head_dim, states, *(s for t in (x, B, C, z) if t is not None for s in t.stride()[:3]))
    strides = [s // align for t in (x, B, C) for s in t.stride()[:3]]
    z_strides = [0, 0, 0] if z is None else [s // align for s in z.stride()[:3]]
    with torch.cuda.device_of(x):
        decays = _decays(dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, shape.chunk, exact)
        starts = _segment_starts(x, B, decays, initial, shape.chunk, segments)
        forward_kernel[(batch * segments * heads * -(-head_dim // p),)](
            *(x, B, C, D, z, decays, starts, y, ungated, final_state),
            *(*strides, *z_strides),
            *(length, heads, heads // groups, head_dim // align, states // align, chunks, segments, segment_chunks),
            *(D is not None and D.dim() == 2, head_dim % p == 0 and states == n, exact),
            *(align, shape.chunk, p, n, shape.stages),
            num_warps=shape.warps,
        )
    keep_initial = for_backward and initial is not None
    kept = initial.unsqueeze(0).clone() if keep_initial else final_state.new_empty((0,))  # type: ignore[union-attr]
    return y, final_state, kept, x.new_empty((0,)) if ungated is None else ungated


def backward(
    y_grad: Tensor | None,
    final_state_grad: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    chunk_size: int,
    seq_idx: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
    outputs: Outputs | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator's backward: gradients of x, dt, A, B, C, D, z, dt_bias, initial state; empty for an absent one."""
    from kernels.ssd.triton_kernels import delta_kernel, gradients_kernel

    (batch, length, heads, head_dim), (groups, states) = x.shape, B.shape[2:]
    given, dtype, device = (x, dt, A, B, C, D, z, dt_bias), x.dtype, x.device
    x, B, C, z = (_unit(t, dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    y_grad = torch.zeros_like(x) if y_grad is None else _unit(y_grad, dtype)
    assert y_grad is not None
    D = None if D is None else D.contiguous()
    shape, exact = _shapes(x, B).gradients, dtype == torch.float32
    chunk, chunks = shape.chunk, -(-length // shape.chunk)
    p, n = _block(head_dim), _block(states)
    parts = min(heads // groups, max(1, PARTS_PER_PROCESSOR * processors(device.index) // (batch * chunks * groups)))
    part_heads = -(-heads // groups // parts)
    parts = -(-heads // groups // part_heads)
    wide_skip = D is not None and D.dim() == 2

    def buffer(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=device)

    with torch.cuda.device_of(x):
        z_grad = x.new_empty((0,))
        if z is not None:
            y_grad, z_grad = _gate_backward(y_grad, ungated, z)
        decays = _decays(dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, chunk, exact)
        initial = starts[0] if starts.numel() else None
        initial_grad = buffer(batch, heads, head_dim, states)
        before = _carries(x, B, decays, initial, None, chunk, False)
        after = _carries(y_grad, C, decays, final_state_grad, initial_grad, chunk, True)
        if outputs is None:
            B_empty, C_empty = (torch.empty((batch, length, groups, states), dtype=dtype, device=device) for _ in "BC")
            outputs = Outputs(
                torch.empty((batch, length, heads, head_dim), dtype=dtype, device=device),
                dt.new_empty(dt.shape),
                B_empty,
                C_empty,
            )
        BC_grads = [outputs.B.unsqueeze(0), outputs.C.unsqueeze(0)]
        if parts > 1:
            BC_grads = [buffer(parts, batch, length, groups, states) for _ in "BC"]
        sums = buffer(6, batch, heads, chunks * chunk)
        through = buffer(batch, heads, chunks)
        D_parts = buffer(batch * chunks, 1, heads * head_dim) if wide_skip else None
        strides = [s for t in (y_grad, x, B, C) for s in t.stride()[:3]]
        strides += [*outputs.x.stride()[:2], *BC_grads[0].stride()[:3]]
        align = alignment(head_dim, states, *strides)
        gradients_kernel[(batch * chunks * groups * parts,)](
            *(y_grad, x, B, C, D, decays, before, after, outputs.x, *BC_grads, sums, through),
            *(D_parts, buffer(batch * chunks * groups * parts, chunk, chunk)),
            *(stride // align for stride in strides),
            *(length, heads, heads // groups, head_dim // align, states // align, chunks, parts, part_heads),
            *(head_dim == p and states == n, exact, align, chunk, p, n, shape.stages),
            num_warps=shape.warps,
        )
        small_parts = buffer(batch * chunks, 3, heads)
        delta_kernel[(batch * chunks, -(-heads // DECAY_HEADS))](
            *(dt, A.contiguous(), None if dt_bias is None else dt_bias.contiguous(), seq_idx, decays, sums, through),
            *(outputs.dt, small_parts, *outputs.dt.stride()[:2]),
            *dt.stride(),
            *((0, 0) if seq_idx is None else seq_idx.stride()),
            *(dt_min, dt_max, length, heads, chunks),
            *(dt_softplus, chunk, DECAY_HEADS),
            num_warps=DECAY_WARPS,
        )
        A_grad, bias_grad, D_grad = _sum(small_parts)
        if D_parts is not None:
            D_grad = _sum(D_parts)[0].view(heads, head_dim)
        if parts > 1:
            for grad, summed in zip(BC_grads, (outputs.B, outputs.C), strict=True):
                summed.copy_(grad.sum(0))
    found = (outputs.x, outputs.dt, A_grad, outputs.B, outputs.C, D_grad, z_grad, bias_grad)
    grads = [x.new_empty((0,)) if g is None else v.to(g.dtype) for g, v in zip(given, found, strict=True)]
    return *grads, initial_grad  # type: ignore[return-value]


def _segments(programs: int, chunks: int, device: torch.device) -> int:
    """In how many parts the time is cut, for that many programs to become enough; each part is walked through."""
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors(device.index) // programs)
    return -(-chunks // max(MIN_SEGMENT_CHUNKS, -(-chunks // wanted)))


def _segment_starts(
    x: Tensor, B: Tensor, decays: Tensor, first: Tensor | None, chunk: int, segments: int
) -> Tensor | None:
    """The states before segments, (batch, segment, head, head_dim, state) fp32, where that of the first is given."""
    from kernels.ssd.triton_kernels import segments_kernel

    if segments == 1:
        return first
    (batch, _, heads, head_dim), states = x.shape, B.shape[3]
    ends = torch.empty((batch, segments, heads, head_dim, states), dtype=torch.float32, device=x.device)
    powers = torch.empty((batch, segments, heads), dtype=torch.float32, device=x.device)
    _walk(x, B, decays, None, None, ends, powers, chunk, False)
    size = head_dim * states
    segments_kernel[(batch * heads, -(-size // SEGMENT_BLOCK))](
        *(first, ends, powers, heads, size, segments, SEGMENT_BLOCK), num_warps=4
    )
    return ends


def _carries(
    rows: Tensor,
    columns: Tensor,
    decays: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    chunk: int,
    reverse: bool,
) -> Tensor:
    """States before the chunks, or gradients of those after them: (batch, chunk, head, state, head_dim)."""
    (batch, _, heads, head_dim), states = rows.shape, columns.shape[3]
    shape = (batch, decays.shape[3] // chunk, heads, states, head_dim)
    carries = torch.empty(shape, dtype=rows.dtype, device=rows.device)
    first = None if first is None else first.float().contiguous()
    _walk(rows, columns, decays, first, carries, last, None, chunk, reverse)
    return carries


def _walk(
    rows: Tensor,
    columns: Tensor,
    decays: Tensor,
    first: Tensor | None,
    carries: Tensor | None,
    last: Tensor | None,
    powers: Tensor | None,
    chunk: int,
    reverse: bool,
) -> None:
    """Launch `states_kernel`, which says what the arguments are."""
    from kernels.ssd.triton_kernels import states_kernel

    (batch, length, heads, head_dim), (groups, states) = rows.shape, columns.shape[2:]
    shape, chunks = _shapes(rows, columns).states, decays.shape[3] // chunk
    segments = 1 if powers is None else powers.shape[1]
    p, n = min(shape.head_dim, _block(head_dim)), min(shape.states, _block(states))
    walks = batch * segments * heads
    enough = PROGRAMS_PER_PROCESSOR * processors(rows.device.index)
    # A state in several parts: more programs, which read the same rows and columns.
    while n > 64 and walks * -(-states // n) * -(-head_dim // p) < enough:
        n //= 2
    while p > 32 and walks * -(-states // n) * -(-head_dim // p) < enough:
        p //= 2
    align = alignment(head_dim, states, *rows.stride()[:3], *columns.stride()[:3])
    states_kernel[(walks * -(-states // n) * -(-head_dim // p),)](
        *(rows, columns, decays, first, carries, last, powers),
        *(s // align for t in (rows, columns) for s in t.stride()[:3]),
        *(length, heads, heads // groups, head_dim // align, states // align, chunks),
        *(segments, -(-chunks // segments)),
        *(reverse, head_dim % p == 0 and states % n == 0, decays.shape[0] > 3, align),
        *(chunk, p, n, shape.stages),
        num_warps=shape.warps,
    )


def _gate_backward(y_grad: Tensor, ungated: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of y before the gate, and of z."""
    from kernels.ssd.triton_kernels import gate_backward_kernel

    batch, length, heads, head_dim = z.shape
    ungated_grad, z_grad = torch.empty_like(ungated), torch.empty_like(ungated)
    gate_backward_kernel[(batch * length, -(-heads * head_dim // GATE_BLOCK))](
        *(y_grad, ungated, z, ungated_grad, z_grad, *y_grad.stride()[:3], *z.stride()[:3]),
        *(length, heads, head_dim, GATE_BLOCK),
    )
    return ungated_grad, z_grad


def _sum(parts: Tensor) -> tuple[Tensor, ...]:
    """The sums over the first axis of parts (row, kind, column), in a fixed order."""
    from kernels.sum_parts import COLUMNS, ROWS, sum_parts

    rows, kinds, columns = parts.shape
    sums = torch.empty((columns, kinds), dtype=torch.float32, device=parts.device)
    sum_parts[(-(-columns // COLUMNS), kinds)](
        parts, sums, None, rows, columns, KINDS=kinds, ROWS=ROWS, COLUMNS=COLUMNS
    )
    return tuple(sums[:, kind].clone() for kind in range(kinds))  # an operator's outputs may not share memory


def _decays(
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    seq_idx: Tensor | None,
    chunk: int,
    exact: bool,
) -> Tensor:
    """Δ and the decays' logarithms summed in chunks, (plane, batch, head, length in whole chunks) fp32."""
    from kernels.ssd.triton_kernels import decays_kernel

    batch, length, heads = dt.shape
    chunks = -(-length // chunk)
    decays = torch.empty((5 if exact else 3, batch, heads, chunks * chunk), dtype=torch.float32, device=dt.device)
    decays_kernel[(batch * chunks, -(-heads // DECAY_HEADS))](
        *(dt, A.contiguous(), None if dt_bias is None else dt_bias.contiguous(), seq_idx, decays),
        *dt.stride(),
        *((0, 0) if seq_idx is None else seq_idx.stride()),
        *(dt_min, dt_max, length, heads, chunks),
        *(dt_softplus, exact, chunk, DECAY_HEADS),
        num_warps=DECAY_WARPS,
    )
    return decays


def _unit(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in that dtype with neighbouring elements of its last axis side by side: a copy only if it must be."""
    if tensor is None:
        return None
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _block(size: int) -> int:
    """The power of two, at least 16, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())
