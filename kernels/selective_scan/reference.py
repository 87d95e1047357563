"""The selective scan in plain PyTorch, with a hand-written backward: the definition of right on every device.

Time is walked in chunks. Inside a chunk the tensors over states end in (state, channel), so that the long channel axis
is innermost; `plan.py` explains the axes before them. Only the state at the start of each chunk is kept; the backward
walks the chunks in reverse and recomputes the states of one chunk at a time. Memory therefore grows with length x
channel, plus the saved states. The recurrence is never inverted: exp(Δ·A) may underflow to 0, and then the state is
simply forgotten.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import compute_dtype
from kernels.operator import operator
from kernels.selective_scan.plan import Plan, make_plan


@operator("mamba_train::selective_scan")
def selective_scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, the final state, and what the backward needs: the chunks' start states and y before the gate."""
    dtype = compute_dtype(x)
    plan = _plan(x, A)
    scan = _Scan(plan, x, dt, A, B, dt_bias, dt_softplus, seq_idx)
    C_split = plan.split(C, dtype)
    starts = x.new_empty(_starts_shape(plan, A) if for_backward else (0,), dtype=dtype)
    y = torch.empty_like(scan.x)

    state = scan.block_starts(initial_state)
    for chunk in range(plan.chunks):
        if for_backward:
            starts[chunk] = state
        states = scan.run_chunk(chunk, state)
        _sum_states(states, C_split[chunk], out=y[chunk])
        state.copy_(states[:, -1])

    final_state = plan.join_state(state)[:, -1].transpose(1, 2).contiguous()
    if D is not None:
        y.addcmul_(scan.x, D.to(dtype))
    ungated = x.new_empty((0,))
    if z is not None:
        if for_backward:
            ungated = plan.join(y, x.dtype)
        y.mul_(F.silu(plan.split(z, dtype)))
    return plan.join(y, x.dtype), final_state, starts, ungated


@selective_scan_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, for_backward):
    dtype = compute_dtype(x)
    final_state = x.new_empty((x.shape[0], x.shape[2], A.shape[1]), dtype=dtype)
    starts = x.new_empty(_starts_shape(_plan(x, A), A) if for_backward else (0,), dtype=dtype)
    ungated = x.new_empty(x.shape if for_backward and z is not None else (0,))
    return x.new_empty(x.shape), final_state, starts, ungated


@operator("mamba_train::selective_scan_backward")
def selective_scan_backward_op(
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
    seq_idx: Tensor | None,
    starts: Tensor,
    ungated: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, dt, A, B, C, D, z, dt_bias, initial_state; empty for an absent argument."""
    dtype = compute_dtype(x)
    chunks, groups, rows = starts.shape[:3]
    plan = Plan(x.shape[0], x.shape[1], groups * rows // x.shape[0], chunks, groups)
    scan = _Scan(plan, x, dt, A, B, dt_bias, dt_softplus, seq_idx)

    y_grad = torch.zeros_like(x) if y_grad is None else y_grad
    y_grad_split = plan.split(y_grad, dtype)
    z_grad = x.new_empty((0,))
    if z is not None:
        z_split = plan.split(z, dtype)
        gate = torch.sigmoid(z_split)
        silu_slope = gate * (1 + z_split * (1 - gate))
        z_grad = plan.join(silu_slope.mul_(y_grad_split).mul_(plan.split(ungated, dtype)), z.dtype)
        y_grad_split.mul_(z_split.mul_(gate))

    core = _scan_backward(scan, plan.split(C, dtype), y_grad_split, starts, final_state_grad)
    driven_grad, delta_grad, A_grad, B_grad, C_grad, initial_state_grad = core

    delta_grad.addcmul_(driven_grad, scan.x)
    x_grad = driven_grad.mul_(scan.delta)
    D_grad = x.new_empty((0,))
    if D is not None:
        x_grad.addcmul_(y_grad_split, D.to(dtype))
        D_grad = (y_grad_split * scan.x).sum(dim=(0, 1, 2, 3)).to(D.dtype)
    if dt_softplus:
        # softplus'(r) = sigmoid(r) = 1 - exp(-softplus(r)): no need to keep r.
        delta_grad.mul_(torch.expm1(-scan.delta).neg_())
    dt_grad = plan.join(delta_grad, dtype)
    dt_bias_grad = x.new_empty((0,)) if dt_bias is None else dt_grad.sum(dim=(0, 1)).to(dt_bias.dtype)
    return (
        plan.join(x_grad, x.dtype),
        dt_grad.to(dt.dtype),
        A_grad.t().to(A.dtype, memory_format=torch.contiguous_format, copy=True),
        plan.join(B_grad, B.dtype),
        plan.join(C_grad, C.dtype),
        D_grad,
        z_grad,
        dt_bias_grad,
        initial_state_grad,
    )


@selective_scan_backward_op.register_fake
def _(y_grad, final_state_grad, x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, starts, ungated):
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty((0,)) if t is None else t.new_empty(t.shape)

    initial_state = x.new_empty((x.shape[0], x.shape[2], A.shape[1]), dtype=compute_dtype(x))
    return like(x), like(dt), like(A), like(B), like(C), like(D), like(z), like(dt_bias), initial_state


def _setup_context(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, seq_idx, initial_state, _ = inputs
    _, _, starts, ungated = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated)
    ctx.dt_softplus = dt_softplus
    ctx.initial_state_dtype = None if initial_state is None else initial_state.dtype


def _backward(ctx, y_grad, final_state_grad, _starts_grad, _ungated_grad):
    x, dt, A, B, C, D, z, dt_bias, seq_idx, starts, ungated = ctx.saved_tensors
    *grads, initial_state_grad = selective_scan_backward_op(
        y_grad, final_state_grad, x, dt, A, B, C, D, z, dt_bias, ctx.dt_softplus, seq_idx, starts, ungated
    )
    wanted = [
        None if argument is None else grad
        for argument, grad in zip((x, dt, A, B, C, D, z, dt_bias), grads, strict=True)
    ]
    initial = None if ctx.initial_state_dtype is None else initial_state_grad.to(ctx.initial_state_dtype)
    return *wanted, None, None, initial, None


selective_scan_op.register_autograd(_backward, setup_context=_setup_context)


class _Scan:
    """The inputs of the recurrence in the layout of the plan, and the two buffers over states of one chunk."""

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        dt_bias: Tensor | None,
        dt_softplus: bool,
        seq_idx: Tensor | None,
    ) -> None:
        dtype = compute_dtype(x)
        raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
        self.plan = plan
        self.x = plan.split(x, dtype)
        # Padding comes after the softplus: with Δ = 0 the state stays as it is.
        self.delta = plan.split(F.softplus(raw) if dt_softplus else raw, dtype)
        self.driven = self.delta * self.x
        self.A = A.to(dtype).t().contiguous()
        self.A_log2 = self.A * math.log2(math.e)
        self.B = plan.split(B, dtype)
        self.begins = None if seq_idx is None else plan.split(_document_begins(seq_idx), torch.bool).squeeze(4)
        shape = (plan.groups, plan.steps, plan.rows, A.shape[1], x.shape[2])
        self.decay = x.new_empty(shape, dtype=dtype)
        self.states = x.new_empty(shape, dtype=dtype)

    def run_chunk(self, chunk: int, start: Tensor | None) -> Tensor:
        """Run the recurrence from `start` (groups, rows, state, channel), None for 0; return the state of each step."""
        self.fill_decay(chunk)
        torch.mul(self.driven[chunk].unsqueeze(3), self.B[chunk].unsqueeze(4), out=self.states)
        if start is not None:
            self.states[:, 0].addcmul_(self.decay[:, 0], start)
        states, decay = self.states.unbind(1), self.decay.unbind(1)
        for step in range(1, len(states)):
            states[step].addcmul_(decay[step], states[step - 1])
        return self.states

    def fill_decay(self, chunk: int) -> None:
        """Set `decay` to exp(Δ·A), or 0 where a document begins."""
        # exp2, because exp on the CPU can be sixty times slower where its result underflows.
        torch.mul(self.delta[chunk].unsqueeze(3), self.A_log2, out=self.decay).exp2_()
        if self.begins is not None:
            rows = self.begins[chunk].reshape(-1).nonzero().squeeze(1)
            _matrices(self.decay).index_fill_(0, rows, 0.0)

    def block_decay(self) -> Tensor:
        """What each block leaves of the state it starts from, (batch, blocks, state, channel)."""
        total = self.delta.sum(dim=(0, 2))
        decay = torch.exp(total.unsqueeze(2) * self.A)
        if self.begins is not None:
            decay.masked_fill_(self.begins.any(dim=2).any(dim=0)[..., None, None], 0.0)
        return self.plan.join_state(decay)

    def block_starts(self, initial_state: Tensor | None) -> Tensor:
        """The state before each block, (groups, rows, state, channel)."""
        plan = self.plan
        starts = self.x.new_zeros((plan.batch, plan.blocks, *self.A.shape))
        if initial_state is not None:
            starts[:, 0] = initial_state.transpose(1, 2)
        if plan.blocks > 1:
            end = self.run_chunk(0, None)[:, -1].clone()
            for chunk in range(1, plan.chunks):
                end.copy_(self.run_chunk(chunk, end)[:, -1])
            ends, decay = plan.join_state(end), self.block_decay()
            for block in range(1, plan.blocks):
                starts[:, block] = torch.addcmul(ends[:, block - 1], decay[:, block - 1], starts[:, block - 1])
        return plan.split_state(starts)


def _scan_backward(
    scan: _Scan, C: Tensor, y_grad: Tensor, starts: Tensor, final_state_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of Δ·x, of Δ through exp(Δ·A), of A.T, B, C and the initial state, in the plan's layout."""
    plan, (n_states, channels) = scan.plan, scan.A.shape
    adjoint = torch.empty_like(scan.states)
    driven_grad, delta_grad = torch.empty_like(scan.x), torch.empty_like(scan.x)
    B_grad, C_grad = torch.empty_like(C), torch.empty_like(C)
    A_grad = scan.A.new_zeros((plan.groups, 1, scan.A.numel()))
    # Sums are products with ones, which the matrix library does faster than a reduction.
    ones_over_states = torch.ones_like(C[0])
    ones_over_time = scan.A.new_ones((plan.groups, 1, plan.steps * plan.rows))
    carry = _block_ends(scan, C, y_grad, adjoint, final_state_grad)
    for chunk in reversed(range(plan.chunks)):
        states = scan.run_chunk(chunk, starts[chunk])
        _run_adjoint(scan, adjoint, C[chunk], y_grad[chunk], carry)
        _sum_channels(states, y_grad[chunk], out=C_grad[chunk])
        _sum_channels(adjoint, scan.driven[chunk], out=B_grad[chunk])
        _sum_states(adjoint, scan.B[chunk], out=driven_grad[chunk])
        # The gradient of log a = Δ·A is adjoint · a · (state before the step).
        log_decay_grad = adjoint.mul_(scan.decay)
        log_decay_grad[:, 1:].mul_(states[:, :-1])
        log_decay_grad[:, 0].mul_(starts[chunk])
        _sum_states(torch.mul(log_decay_grad, scan.A, out=scan.decay), ones_over_states, out=delta_grad[chunk])
        log_decay_grad.mul_(scan.delta[chunk].unsqueeze(3))
        A_grad.baddbmm_(ones_over_time, log_decay_grad.view(plan.groups, -1, n_states * channels))
    initial_state_grad = plan.join_state(carry)[:, 0].transpose(1, 2).contiguous()
    return driven_grad, delta_grad, A_grad.sum(dim=0).view_as(scan.A), B_grad, C_grad, initial_state_grad


def _run_adjoint(scan: _Scan, adjoint: Tensor, C: Tensor, y_grad: Tensor, carry: Tensor) -> None:
    """Fill `adjoint` with the gradients of the states; `carry` goes in as that of the end and out as of the start."""
    torch.mul(C.unsqueeze(4), y_grad.unsqueeze(3), out=adjoint)
    adjoint[:, -1] += carry
    adjoints, decay = adjoint.unbind(1), scan.decay.unbind(1)
    for step in reversed(range(len(adjoints) - 1)):
        adjoints[step].addcmul_(decay[step + 1], adjoints[step + 1])
    torch.mul(decay[0], adjoints[0], out=carry)


def _block_ends(scan: _Scan, C: Tensor, y_grad: Tensor, adjoint: Tensor, final_state_grad: Tensor | None) -> Tensor:
    """The gradient of the state after each block, (groups, rows, state, channel)."""
    plan = scan.plan
    ends = scan.x.new_zeros((plan.batch, plan.blocks, *scan.A.shape))
    if final_state_grad is not None:
        ends[:, -1] = final_state_grad.transpose(1, 2)
    if plan.blocks > 1:
        carry = torch.zeros_like(scan.states[:, 0])
        for chunk in reversed(range(plan.chunks)):
            scan.fill_decay(chunk)
            _run_adjoint(scan, adjoint, C[chunk], y_grad[chunk], carry)
        begins, decay = plan.join_state(carry), scan.block_decay()
        for block in reversed(range(plan.blocks - 1)):
            ends[:, block] = torch.addcmul(begins[:, block + 1], decay[:, block + 1], ends[:, block + 1])
    return plan.split_state(ends)


def _plan(x: Tensor, A: Tensor) -> Plan:
    return make_plan(x.shape[0], x.shape[1], A.shape[0] * A.shape[1], x.device)


def _starts_shape(plan: Plan, A: Tensor) -> tuple[int, ...]:
    return plan.chunks, plan.groups, plan.rows, A.shape[1], A.shape[0]


def _document_begins(seq_idx: Tensor) -> Tensor:
    """Whether a document begins at each position but the first, (batch, length, 1)."""
    return F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0)).unsqueeze(2)


def _matrices(values: Tensor) -> Tensor:
    """View (groups, steps, rows, state, channel) as a batch of (state, channel) matrices."""
    return values.view(-1, *values.shape[3:])


def _sum_states(values: Tensor, weights: Tensor, out: Tensor) -> None:
    """out[..., channel] = sum over states of values[..., state, channel] * weights[..., state]."""
    flat = _matrices(values)
    torch.bmm(weights.view(-1, 1, flat.shape[1]), flat, out=out.view(-1, 1, flat.shape[2]))


def _sum_channels(values: Tensor, weights: Tensor, out: Tensor) -> None:
    """out[..., state] = sum over channels of values[..., state, channel] * weights[..., channel]."""
    flat = _matrices(values)
    # The row vector goes first: the other way round the same product takes three times as long.
    torch.bmm(weights.view(-1, 1, flat.shape[2]), flat.transpose(1, 2), out=out.view(-1, 1, flat.shape[1]))
