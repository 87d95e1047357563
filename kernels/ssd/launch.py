"""The forward of SSD on CUDA devices: layouts, buffers, launches of the Triton kernels; what the backward shares.

The kernels work on so many states at once as their tiles hold. Where there are more, they run once for each block of
states: y, and the gradients of x and dt, are sums over states.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import alignment, has_large_shared_memory, processors, triton_unsupported
from kernels.launcher import Launch, Pointer, device_of, remembered
from kernels.ssd import kept

MAX_HEAD_DIM = 128
MAX_ROW_STRIDE = 2**24
DECAY_HEADS = 8  # of a program of the kernel that computes the decays
DECAY_WARPS = 4
SEGMENT_BLOCK = 512
SEGMENT_WARPS = 4
PROGRAMS_PER_PROCESSOR = 2  # that walk through time
MIN_SEGMENT_CHUNKS = 8


class Shape(NamedTuple):
    """How a kernel divides its work."""

    chunk: int  # positions
    head_dim: int  # channels of a head in a program, at most
    states: int  # in a program, at most
    warps: int
    stages: int  # of what a loop reads, on their way from memory


# For activations of 16 bits; see `shapes` for others. The chunk of STATES is that of GRADIENTS, that of FLOWS one or
# two of them.
FORWARD = Shape(chunk=64, head_dim=64, states=128, warps=4, stages=3)
STATES = Shape(chunk=64, head_dim=64, states=128, warps=4, stages=3)
GRADIENTS = Shape(chunk=64, head_dim=128, states=128, warps=8, stages=3)
FLOWS = Shape(chunk=128, head_dim=128, states=128, warps=4, stages=3)
MAX_GRADIENTS_STATE = 64 * 128  # numbers of a head's state in a program of the backward


class Shapes(NamedTuple):
    """Those of one call."""

    forward: Shape
    states: Shape
    gradients: Shape
    flows: Shape


def shapes(x: Tensor, B: Tensor) -> Shapes:
    """Smaller tiles and fewer stages where those of the table would not fit into shared memory."""
    large = has_large_shared_memory(x.device.index)
    return _shapes(FORWARD, STATES, GRADIENTS, FLOWS, large, int(x.shape[3]), int(B.shape[3]), x.dtype)


@functools.cache
def _shapes(
    forward: Shape,
    states: Shape,
    gradients: Shape,
    flows: Shape,
    large: bool,
    head_dim: int,
    n_states: int,
    dtype: torch.dtype,
) -> Shapes:
    wide = block(head_dim) > 64
    gradients = gradients._replace(states=min(gradients.states, MAX_GRADIENTS_STATE // block(head_dim)))
    if wide or not large:
        gradients = gradients._replace(stages=min(2, gradients.stages))
        flows = flows._replace(stages=1)
    if not large:
        forward = forward._replace(stages=min(2, forward.stages))
        flows = flows._replace(chunk=gradients.chunk)
    if not large and (wide or n_states > gradients.states):
        gradients = gradients._replace(stages=1)
    if dtype == torch.float32:
        forward = forward._replace(chunk=min(32, forward.chunk), head_dim=32, stages=1)
        states = states._replace(states=64, stages=1)
        gradients = gradients._replace(chunk=min(16 if wide else 32, gradients.chunk), stages=1)
        flows = flows._replace(chunk=gradients.chunk, stages=1)
    return Shapes(forward, states, gradients, flows)


def unsupported(x: Tensor, dt_min: float) -> str | None:
    """Why the kernels cannot run on these inputs, None when they can."""
    if dt_min < 0:
        return "dt_limit lets Δ be negative"
    if x.shape[3] > MAX_HEAD_DIM:
        return f"heads of {x.shape[3]} channels are wider than {MAX_HEAD_DIM}"
    return triton_unsupported(x)


def fake(
    x: Tensor, B: Tensor, z: Tensor | None, initial_state: Tensor | None, for_backward: bool, with_final_state: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `forward` returns, without values."""
    state = (x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    ungated = x.new_empty(x.shape if for_backward and z is not None else (0,))
    layout = kept.layout_of(x.shape, x.dtype, B.shape[3], shapes(x, B))
    return (
        x.new_empty(x.shape),
        x.new_empty(state if with_final_state else (0,), dtype=torch.float32),
        x.new_empty(kept.numbers(layout, initial_state) if for_backward else 0, dtype=torch.float32),
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
    with_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator's forward: y, the final state, what else the backward needs, y before the gate.

    `chunk_size` is what the reference works with; here the kernels have their own.
    """
    x, B, C, z = (unit(t, x.dtype) for t in (x, B, C, z))  # type: ignore[assignment]
    D, initial_state = (None if t is None else t.contiguous() for t in (D, initial_state))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ungated = torch.empty_like(y) if for_backward and z is not None else None
    initial = None if initial_state is None else initial_state.float()
    found = shapes(x, B)
    shape, layout = found.forward, kept.layout(x.shape, x.dtype, B.shape[3], found)
    n_kept = kept.numbers(layout, initial) if for_backward else 0
    keeps = torch.empty(n_kept, dtype=torch.float32, device=x.device)
    kept_decays, carried, kept_initial = kept.cut(x, keeps, layout)
    if kept_initial is not None and initial is not None:
        kept_initial.copy_(initial.view(-1))
    padded, exact = layout.decays_shape[3], x.dtype == torch.float32
    with device_of(x):
        decays = kept_decays or torch.empty(layout.decays_shape, dtype=torch.float32, device=x.device)
        fill_decays(decays, padded, dt, A, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, shape.chunk, exact)
        blocks = state_blocks(B.shape[3], shape.states)
        before: Tensor | None = None
        ends: list[Tensor] = []
        for states in blocks[:-1]:
            before = torch.empty(x.shape, dtype=torch.float32, device=x.device) if before is None else before
            part = of_states(x, B, C, initial, states)
            ends.append(
                _run(
                    *part,
                    None,
                    None,
                    decays,
                    padded,
                    before if ends else None,
                    before,
                    None,
                    None,
                    with_final_state,
                    shape,
                )
            )
        part = of_states(x, B, C, initial, blocks[-1])
        ends.append(_run(*part, D, z, decays, padded, before, y, ungated, carried, with_final_state, shape))
    final_state = ends[0] if len(ends) == 1 or not with_final_state else torch.cat(ends, dim=3)
    return y, final_state, keeps, x.new_empty((0,)) if ungated is None else ungated


def _run(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    initial: Tensor | None,
    D: Tensor | None,
    z: Tensor | None,
    decays: Pointer,
    padded: int,
    before: Tensor | None,
    y: Tensor,
    ungated: Tensor | None,
    carried: Pointer | None,
    with_final_state: bool,
    shape: Shape,
) -> Tensor:
    """Fill y, and `ungated` and `carried` where given, by one block of states; return the final ones if asked for."""
    (batch, _, heads, head_dim), states = x.shape, B.shape[3]
    chunks = padded // shape.chunk
    segments = _segments(batch * heads, chunks, x.device)
    starts = _segment_starts(x, B, decays, padded, initial, shape.chunk, segments)
    of_state = (batch, heads, head_dim, states) if with_final_state else (0,)
    final_state = torch.empty(of_state, dtype=torch.float32, device=x.device)
    strides = (x.stride(), B.stride(), C.stride(), None if z is None else z.stride())
    wide_skip, exact = D is not None and D.dim() == 2, x.dtype == torch.float32
    launch = _forward_launch(x.shape, B.shape, strides, segments, chunks, wide_skip, exact, shape)
    launch(x, B, C, D, z, decays, starts, before, y, ungated, final_state if with_final_state else None, carried)
    return final_state


@remembered
def _forward_launch(
    x_shape: torch.Size,
    B_shape: torch.Size,
    strides: tuple[tuple[int, ...] | None, ...],
    segments: int,
    chunks: int,
    wide_skip: bool,
    exact: bool,
    shape: Shape,
) -> Launch:
    """strides: of x, B, C, and z where there is one."""
    from kernels.ssd.forward_kernels import forward_kernel

    (batch, length, heads, head_dim), (groups, states) = x_shape, B_shape[2:]
    p, n = min(shape.head_dim, block(head_dim)), block(states)
    align = alignment(head_dim, states, *(s for rows in strides if rows is not None for s in rows[:3]))
    outer = [0 if rows is None else rows[axis] // align for rows in strides for axis in range(3)]
    sizes = (length, heads, heads // groups, head_dim // align, states // align, chunks)
    whole = head_dim % p == 0 and states == n
    stages = shape.stages if strides[3] is None else min(2, shape.stages)  # with tiles of z, too, two fit side by side
    return Launch(
        forward_kernel,
        (batch * segments * heads * -(-head_dim // p), 1),
        (*outer, *sizes, segments, -(-chunks // segments)),
        (wide_skip, whole, exact, align, shape.chunk, p, n, stages),
        shape.warps,
    )


def state_blocks(states: int, most: int) -> list[slice]:
    """The states in blocks of that many."""
    return [slice(first, min(first + most, states)) for first in range(0, states, most)]


def of_states(
    x: Tensor, B: Tensor, C: Tensor, state: Tensor | None, states: slice
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same with these states alone: views of B and C, `state` (batch, head, head_dim, state) contiguous."""
    if states == slice(0, B.shape[3]):
        return x, B, C, state
    return x, B[..., states], C[..., states], None if state is None else state[..., states].contiguous()


def _segments(programs: int, chunks: int, device: torch.device) -> int:
    """In how many parts the time is cut, for that many programs to become enough; each part is walked through."""
    wanted = max(1, PROGRAMS_PER_PROCESSOR * processors(device.index) // programs)
    return -(-chunks // max(MIN_SEGMENT_CHUNKS, -(-chunks // wanted)))


def _segment_starts(
    x: Tensor, B: Tensor, decays: Pointer, padded: int, first: Tensor | None, chunk: int, segments: int
) -> Tensor | None:
    """The states before segments, (batch, segment, head, head_dim, state) fp32, where that of the first is given."""
    if segments == 1:
        return first
    (batch, _, heads, head_dim), states = x.shape, B.shape[3]
    ends = torch.empty((batch, segments, heads, head_dim, states), dtype=torch.float32, device=x.device)
    powers = torch.empty((batch, segments, heads), dtype=torch.float32, device=x.device)
    enough, exact, chunks = (
        PROGRAMS_PER_PROCESSOR * processors(x.device.index),
        x.dtype == torch.float32,
        padded // chunk,
    )
    forth, shape = (x.stride(), B.stride()), shapes(x, B).states
    launch = walk_launch(x.shape, B.shape, forth, None, False, segments, enough, exact, chunk, chunks, shape)
    launch(x, B, None, None, decays, None, None, None, None, ends, powers)
    _segments_launch(batch, heads, head_dim * states, segments)(ends, first, powers)
    return ends


@remembered
def _segments_launch(batch: int, heads: int, size: int, segments: int) -> Launch:
    from kernels.ssd.forward_kernels import segments_kernel

    grid = (batch * heads, -(-size // SEGMENT_BLOCK))
    return Launch(segments_kernel, grid, (heads, size, segments), (SEGMENT_BLOCK,), SEGMENT_WARPS)


@remembered
def walk_launch(
    x_shape: torch.Size,
    B_shape: torch.Size,
    forth: tuple[tuple[int, ...], ...],
    back: tuple[tuple[int, ...], ...] | None,
    only_back: bool,
    segments: int,
    enough: int,
    exact: bool,
    chunk: int,
    chunks: int,
    shape: Shape,
) -> Launch:
    """Of `states_kernel`. forth: strides of x and B; back: of y_grad and C; enough: programs.

    only_back: the states before chunks are there already.
    """
    from kernels.ssd.forward_kernels import states_kernel

    (batch, length, heads, head_dim), (groups, n_states) = x_shape, B_shape[2:]
    p, n = min(shape.head_dim, block(head_dim)), min(shape.states, block(n_states))
    walks = batch * segments * heads * (1 if back is None or only_back else 2)
    # A state in several parts: more programs, which read the same rows and columns.
    while n > 64 and walks * -(-n_states // n) * -(-head_dim // p) < enough:
        n //= 2
    while p > 32 and walks * -(-n_states // n) * -(-head_dim // p) < enough:
        p //= 2
    strides = [stride for rows in (*forth, *(back or forth)) for stride in rows[:3]]
    align = alignment(head_dim, n_states, *strides)
    sizes = (length, heads, heads // groups, head_dim // align, n_states // align, chunks)
    whole = head_dim % p == 0 and n_states % n == 0
    return Launch(
        states_kernel,
        (walks * -(-n_states // n) * -(-head_dim // p), 1),
        (*[s // align for s in strides], *sizes, segments, -(-chunks // segments)),
        (back is not None, only_back, whole, exact, align, chunk, p, n, shape.stages),
        shape.warps,
    )


def fill_decays(
    decays: Pointer,
    padded: int,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    seq_idx: Tensor | None,
    chunk: int,
    exact: bool,
) -> None:
    """Δ and the decays' logarithms summed in chunks; decays: (plane, batch, head, padded) fp32."""
    chunks = padded // chunk
    seq_strides = (0, 0) if seq_idx is None else seq_idx.stride()
    launch = _decays_launch(dt.shape, dt.stride(), seq_strides, dt_softplus, dt_min, dt_max, exact, chunk, chunks)
    launch(dt, A.contiguous(), None if dt_bias is None else dt_bias.contiguous(), seq_idx, decays)


@remembered
def _decays_launch(
    dt_shape: torch.Size,
    dt_strides: tuple[int, ...],
    seq_strides: tuple[int, ...],
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
    exact: bool,
    chunk: int,
    chunks: int,
) -> Launch:
    from kernels.ssd.decay_kernels import decays_kernel

    batch, length, heads = dt_shape
    return Launch(
        decays_kernel,
        (batch * chunks, -(-heads // DECAY_HEADS)),
        (*dt_strides, *seq_strides, dt_min, dt_max, length, heads, chunks),
        (dt_softplus, exact, chunk, DECAY_HEADS),
        DECAY_WARPS,
    )


def unit(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in that dtype with neighbouring elements of its last axis side by side: a copy only if it must be.

    Also with rows near enough to each other for offsets in a chunk to fit in 32 bits.
    """
    if tensor is None:
        return None
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.stride(3) == 1 and tensor.stride(1) < MAX_ROW_STRIDE else tensor.contiguous()


def block(size: int) -> int:
    """The power of two, at least 16, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())
