"""The state-space dual (SSD) operator of Mamba-2 in plain PyTorch, with a hand-written backward.

The sequence is walked in chunks. Inside a chunk the recurrence is a product with a lower-triangular matrix of decays;
between chunks a state is carried on. Only the state at the start of each chunk is kept; the backward walks the chunks
in reverse and recomputes the matrices of one chunk at a time. A decay from position s to t is the exponential of a
difference of cumulative sums, which is negative and is masked before it is exponentiated, so nothing overflows. The
sums are fp64: after strong decays they are large, and fp32 would lose the small differences between them.

Axes inside: `driven` is Δ·x; batch b, head h, group g, position q, head_dim p, state n.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import compute_dtype
from kernels.operator import operator


@operator("mamba_train::ssd")
def ssd_op(
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
    """Return y, the final state, and what the backward needs: the chunks' start states and y before the gate.

    What is not asked for is empty.
    """
    dtype = compute_dtype(x)
    scan = _Scan(x, dt, A, B, C, dt_bias, dt_softplus, (dt_min, dt_max), chunk_size, seq_idx)
    starts = x.new_empty(_starts_shape(x, B, chunk_size) if for_backward else (0,), dtype=dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    state = x.new_zeros(_state_shape(x, B), dtype=dtype)
    if initial_state is not None:
        state += initial_state
    for number in range(scan.n_chunks):
        if for_backward:
            starts[number] = state
        chunk = _Chunk(scan, number)
        y[:, chunk.span] = (chunk.mixing @ chunk.driven + chunk.from_state(state)).transpose(1, 2)
        state = chunk.next_state(state)
    if D is not None:
        y.addcmul_(x.to(dtype), _per_head(D, dtype))
    ungated = x.new_empty((0,))
    if z is not None:
        if for_backward:
            ungated = y.to(x.dtype, copy=True)
        y.mul_(F.silu(z.to(dtype)))
    return y.to(x.dtype), state if with_final_state else state.new_empty((0,)), starts, ungated


@ssd_op.register_fake
def _(
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    dt_min,
    dt_max,
    chunk_size,
    seq_idx,
    initial_state,
    for_backward,
    with_final_state,
):
    dtype = compute_dtype(x)
    starts = x.new_empty(_starts_shape(x, B, chunk_size) if for_backward else (0,), dtype=dtype)
    ungated = x.new_empty(x.shape if for_backward and z is not None else (0,))
    state = x.new_empty(_state_shape(x, B) if with_final_state else (0,), dtype=dtype)
    return x.new_empty(x.shape), state, starts, ungated


@operator("mamba_train::ssd_backward")
def ssd_backward_op(
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
    with_initial_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; empty for an absent argument.

    starts: empty where the forward kept nothing, which it may without z and an initial state.
    """
    dtype = compute_dtype(x)
    if not starts.numel():
        options = (dt_softplus, dt_min, dt_max, chunk_size, seq_idx, None, True, False)
        starts = ssd_op._init_fn(x, dt, A, B, C, None, None, dt_bias, *options)[2]
    scan = _Scan(x, dt, A, B, C, dt_bias, dt_softplus, (dt_min, dt_max), chunk_size, seq_idx)
    y_grad = x.new_zeros(x.shape, dtype=dtype) if y_grad is None else y_grad.to(dtype)
    z_grad = x.new_empty((0,))
    if z is not None:
        z_wide = z.to(dtype)
        gate = torch.sigmoid(z_wide)
        slope = gate * (1 + z_wide * (1 - gate))
        z_grad = _dense(slope.mul_(y_grad).mul_(ungated.to(dtype)), z.dtype)
        y_grad = y_grad * z_wide * gate

    carry = torch.zeros_like(starts[0]) if final_state_grad is None else final_state_grad.to(dtype)
    driven_grad, log_grad = torch.empty_like(scan.driven), torch.empty_like(scan.log2_decay)
    B_grad, C_grad = torch.empty_like(scan.B), torch.empty_like(scan.C)
    for number in reversed(range(scan.n_chunks)):
        chunk = _Chunk(scan, number)
        q = chunk.span
        found = _chunk_backward(chunk, y_grad[:, q].transpose(1, 2), starts[number], carry)
        driven_grad[:, :, q], log_grad[:, :, q], B_grad[:, :, q], C_grad[:, :, q], carry = found

    x_wide, driven_grad = x.to(dtype), driven_grad.transpose(1, 2)
    log_grad, delta = log_grad.transpose(1, 2), scan.delta
    delta_grad = (driven_grad * x_wide).sum(-1) + (log_grad * A.double()).to(dtype)
    x_grad = driven_grad * delta.unsqueeze(-1)
    D_grad = x.new_empty((0,))
    if D is not None:
        x_grad.addcmul_(y_grad, _per_head(D, dtype))
        products = (y_grad * x_wide).sum(dim=(0, 1))
        D_grad = (products if D.dim() == 2 else products.sum(-1)).to(D.dtype)
    dt_grad = delta_grad.mul_(scan.delta_slope)
    return (
        _dense(x_grad, x.dtype),
        _dense(dt_grad, dt.dtype),
        (log_grad * delta).sum(dim=(0, 1)).to(A.dtype),
        _dense(B_grad.transpose(1, 2), B.dtype),
        _dense(C_grad.transpose(1, 2), C.dtype),
        D_grad,
        z_grad,
        x.new_empty((0,)) if dt_bias is None else dt_grad.sum(dim=(0, 1)).to(dt_bias.dtype),
        _dense(carry, dtype) if with_initial_grad else x.new_empty((0,), dtype=dtype),
    )


@ssd_backward_op.register_fake
def _(
    y_grad,
    final_state_grad,
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    dt_softplus,
    dt_min,
    dt_max,
    chunk_size,
    seq_idx,
    starts,
    ungated,
    with_initial_grad,
):
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty((0,)) if t is None else t.new_empty(t.shape)

    initial_state = x.new_empty(_state_shape(x, B) if with_initial_grad else (0,), dtype=compute_dtype(x))
    return like(x), like(dt), like(A), like(B), like(C), like(D), like(z), like(dt_bias), initial_state


def _setup_context(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, chunk_size, seq_idx, initial_state, _, _ = inputs
    _, _, starts, ungated = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated)
    ctx.options = (dt_softplus, dt_min, dt_max, chunk_size)
    ctx.initial_state_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx, y_grad, final_state_grad, _starts_grad, _ungated_grad):
    *arguments, seq_idx, starts, ungated = ctx.saved_tensors
    has_initial = ctx.initial_state_dtype is not None
    kept = (seq_idx, starts, ungated)
    *grads, state_grad = ssd_backward_op(y_grad, final_state_grad, *arguments, *ctx.options, *kept, has_initial)
    wanted = [None if argument is None else grad for argument, grad in zip(arguments, grads, strict=True)]
    initial = state_grad.to(ctx.initial_state_dtype) if has_initial else None
    return *wanted, None, None, None, None, None, initial, None, None


ssd_op.register_autograd(_backward, setup_context=_setup_context)


class _Scan:
    """The inputs of the recurrence, with the position next to the innermost axis."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        dt_limit: tuple[float, float],
        chunk_size: int,
        seq_idx: Tensor | None,
    ) -> None:
        dtype = compute_dtype(x)
        self.length, self.chunk_size = x.shape[1], chunk_size
        self.n_chunks = math.ceil(self.length / chunk_size)
        raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
        free = F.softplus(raw) if dt_softplus else raw
        self.delta = free.clamp(*dt_limit)  # (b, length, h)
        # softplus'(r) = sigmoid(r) = 1 - exp(-softplus(r)): no need to keep r.
        slope = torch.expm1(-free).neg_() if dt_softplus else torch.ones_like(free)
        self.delta_slope = slope.masked_fill_((free < dt_limit[0]) | (free > dt_limit[1]), 0.0)
        self.driven = (x.to(dtype) * self.delta.unsqueeze(-1)).transpose(1, 2).contiguous()  # (b, h, length, p)
        self.B, self.C = (v.to(dtype).transpose(1, 2).contiguous() for v in (B, C))  # (b, g, length, n)
        # Exponents of 2, because exp on the CPU can be sixty times slower where its result underflows.
        self.log2_decay = ((self.delta.double() * A.double()) * math.log2(math.e)).transpose(1, 2)  # (b, h, length)
        # The ordinal of each position's document, (b, 1 + length); the initial state is of document 0.
        self.documents = None
        if seq_idx is not None:
            self.documents = F.pad((seq_idx[:, 1:] != seq_idx[:, :-1]).long().cumsum(dim=1), (2, 0))


class _Chunk:
    """The decays and products of one chunk."""

    def __init__(self, scan: _Scan, number: int) -> None:
        start, stop = number * scan.chunk_size, min((number + 1) * scan.chunk_size, scan.length)
        self.span = slice(start, stop)
        self.driven, self.B, self.C = (v[:, :, start:stop] for v in (scan.driven, scan.B, scan.C))
        self.groups = self.B.shape[1]
        dtype, size = self.driven.dtype, stop - start
        total = scan.log2_decay[:, :, start:stop].cumsum(-1)
        # Positions that a position must not see: later ones, and those of other documents.
        hidden = torch.ones(size, size, dtype=torch.bool, device=total.device).triu_(1)
        self.decay_from_start, self.decay_to_end = total.exp2(), (total[..., -1:] - total).exp2()
        self.decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(dtype)  # (b, h, q, q), from column to row
        if scan.documents is not None:
            before, here = scan.documents[:, start, None], scan.documents[:, start + 1 : stop + 1]
            hidden = hidden | (here.unsqueeze(2) != here.unsqueeze(1)).unsqueeze(1)
            self.decay_from_start.masked_fill_((here != before).unsqueeze(1), 0.0)
            self.decay_to_end.masked_fill_((here != here[:, -1:]).unsqueeze(1), 0.0)
        self.decay.masked_fill_(hidden, -math.inf).exp2_()
        self.decay_from_start = self.decay_from_start.to(dtype).unsqueeze(-1)  # (b, h, q, 1)
        self.decay_to_end = self.decay_to_end.to(dtype).unsqueeze(-1)
        self.decay_through = self.decay_from_start[:, :, -1:]  # (b, h, 1, 1), of the state before the chunk
        self.mixing = self.to_each_head(self.C @ self.B.transpose(-1, -2)) * self.decay  # (b, h, q, q)

    def from_state(self, state: Tensor) -> Tensor:
        """What `state` (b, h, p, n) before the chunk adds to y, (b, h, q, p)."""
        return self.to_heads(self.C @ self.grouped_state(state).transpose(-1, -2)) * self.decay_from_start

    def next_state(self, state: Tensor) -> Tensor:
        """The state after the chunk."""
        added = self.to_groups(self.driven * self.decay_to_end).transpose(-1, -2) @ self.B
        return state * self.decay_through + added.view_as(state)

    def to_each_head(self, values: Tensor) -> Tensor:
        """(b, g, q, q) to (b, h, q, q): each head has the values of its group."""
        return values.repeat_interleave(self.driven.shape[1] // self.groups, dim=1)

    def sum_heads(self, values: Tensor) -> Tensor:
        """(b, h, q, q) to (b, g, q, q)."""
        return values.unflatten(1, (self.groups, -1)).sum(dim=2)

    def to_groups(self, values: Tensor) -> Tensor:
        """(b, h, q, p) to (b, g, q, heads of the group x p): one wide product instead of many narrow ones."""
        return values.unflatten(1, (self.groups, -1)).transpose(2, 3).flatten(3)

    def to_heads(self, values: Tensor) -> Tensor:
        """The inverse of to_groups."""
        return values.unflatten(3, (-1, self.driven.shape[-1])).transpose(2, 3).flatten(1, 2)

    def grouped_state(self, state: Tensor) -> Tensor:
        """(b, h, p, n) to (b, g, heads of the group x p, n)."""
        return state.unflatten(1, (self.groups, -1)).flatten(2, 3)


def _chunk_backward(
    chunk: _Chunk, y_grad: Tensor, start: Tensor, carry: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of driven, of Δ·A, of B and C, and of the state before the chunk.

    y_grad (b, h, q, p); start: the state before the chunk; carry: the gradient of the state after it.
    """
    mixing_grad = y_grad @ chunk.driven.transpose(-1, -2)
    products_grad = chunk.sum_heads(mixing_grad * chunk.decay)
    end_part = chunk.to_heads(chunk.B @ chunk.grouped_state(carry).transpose(-1, -2)) * chunk.decay_to_end
    y_grad_start = chunk.to_groups(y_grad * chunk.decay_from_start)
    driven_end = chunk.to_groups(chunk.driven * chunk.decay_to_end)

    driven_grad = chunk.mixing.transpose(-1, -2) @ y_grad + end_part
    B_grad = products_grad.transpose(-1, -2) @ chunk.C + driven_end @ chunk.grouped_state(carry)
    C_grad = products_grad @ chunk.B + y_grad_start @ chunk.grouped_state(start)
    start_grad = carry * chunk.decay_through + (y_grad_start.transpose(-1, -2) @ chunk.C).view_as(carry)

    # The gradient of the cumulative sum at t: what decays on its way to t, less what decays from there. What passes
    # through both cancels; summed in fp64 it cancels exactly. A position's decay to itself is always 1.
    pairs = mixing_grad.mul_(chunk.mixing).tril_(-1)
    from_start = (y_grad * chunk.from_state(start)).sum(-1, dtype=torch.float64)
    to_end = (end_part * chunk.driven).sum(-1, dtype=torch.float64)
    total_grad = pairs.sum(-1, dtype=torch.float64) - pairs.sum(-2, dtype=torch.float64) + from_start - to_end
    through = (start * carry * chunk.decay_through).sum((-2, -1), dtype=torch.float64)
    total_grad[..., -1] += to_end.sum(-1) + through
    log_grad = total_grad.flip(-1).cumsum(-1).flip(-1)
    return driven_grad, log_grad, B_grad, C_grad, start_grad


def _state_shape(x: Tensor, B: Tensor) -> tuple[int, ...]:
    return x.shape[0], x.shape[2], x.shape[3], B.shape[3]


def _starts_shape(x: Tensor, B: Tensor, chunk_size: int) -> tuple[int, ...]:
    return (x.shape[1] + chunk_size - 1) // chunk_size, *_state_shape(x, B)


def _per_head(D: Tensor, dtype: torch.dtype) -> Tensor:
    """D (head) or (head, head_dim) as a factor of (..., head, head_dim)."""
    return (D if D.dim() == 2 else D.unsqueeze(-1)).to(dtype)


def _dense(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A new tensor of that dtype in the plain order of its axes: outputs may not alias inputs."""
    return values.to(dtype, memory_format=torch.contiguous_format, copy=True)
