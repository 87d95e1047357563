"""Depthwise causal convolution in plain PyTorch: a sum of `width` shifted products, which on channel-last tensors
beats a general convolution. The backward keeps the input only and recomputes the value before the activation.

A boundary that hides lag j hides every longer lag too. So the forward adds the lags from the longest to the shortest
and clears the rows a boundary cuts after each; the backward goes from the shortest to the longest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.checks import compute_dtype
from kernels.operator import operator


@operator("mamba_train::causal_conv1d")
def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y (batch, length, channel) and the final state (batch, width-1, channel)."""
    width = weight.shape[1]
    padded = _padded(x, width, initial_state)
    hidden = None if seq_idx is None else _hidden(seq_idx, width)
    y = _convolve(padded, weight, bias, hidden)
    if silu:
        torch.nn.functional.silu(y, inplace=True)
    final_state = padded[:, x.shape[1] :].to(x.dtype, memory_format=torch.contiguous_format, copy=True)
    if seq_idx is not None:
        final_state.masked_fill_(_hidden_at_end(seq_idx, width).unsqueeze(2), 0.0)
    return y.to(x.dtype), final_state


@causal_conv1d_op.register_fake
def _(x, weight, bias, silu, seq_idx, initial_state):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], weight.shape[1] - 1, x.shape[2]))


@operator("mamba_train::causal_conv1d_backward")
def causal_conv1d_backward_op(
    y_grad: Tensor | None,
    final_state_grad: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    seq_idx: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias and initial_state, empty for an absent one."""
    length, width, dtype = x.shape[1], weight.shape[1], compute_dtype(x)
    padded = _padded(x, width, initial_state)
    hidden = None if seq_idx is None else _hidden(seq_idx, width)
    padded_grad = torch.zeros_like(padded)
    if final_state_grad is not None:
        tail = final_state_grad.to(dtype)
        if seq_idx is not None:
            tail = tail.masked_fill(_hidden_at_end(seq_idx, width).unsqueeze(2), 0.0)
        padded_grad[:, length:] += tail
    weight_grad = weight.new_zeros(weight.shape, dtype=dtype)
    bias_grad = x.new_empty((0,)) if bias is None else torch.zeros_like(bias)
    if y_grad is not None:
        grad = y_grad.to(dtype, memory_format=torch.contiguous_format, copy=True)
        if silu:
            _silu_backward_(grad, _convolve(padded, weight, bias, hidden))
        if bias is not None:
            bias_grad = grad.sum(dim=(0, 1)).to(bias.dtype)
        taps = weight.to(dtype).t().contiguous()
        products, ones = torch.empty_like(grad), grad.new_ones((1, grad.shape[0] * length))
        for lag in range(width):
            if hidden is not None:
                _clear_rows_(grad, hidden[lag])
            window = slice(width - 1 - lag, width - 1 - lag + length)
            padded_grad[:, window].addcmul_(grad, taps[width - 1 - lag])
            torch.mul(grad, padded[:, window], out=products)
            weight_grad[:, width - 1 - lag] = torch.mm(ones, products.view(-1, x.shape[2]))[0]
    before, inside = padded_grad.split((width - 1, length), dim=1)
    dense = torch.contiguous_format
    return (
        inside.to(x.dtype, memory_format=dense, copy=True),
        weight_grad.to(weight.dtype),
        bias_grad,
        x.new_empty((0,)) if initial_state is None else before.to(x.dtype, memory_format=dense, copy=True),
    )


@causal_conv1d_backward_op.register_fake
def _(y_grad, final_state_grad, x, weight, bias, silu, seq_idx, initial_state):
    bias_grad = x.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
    state_grad = x.new_empty((0,) if initial_state is None else initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias_grad, state_grad


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, silu, seq_idx, initial_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, seq_idx, initial_state)
    ctx.silu = silu


def _backward(ctx, y_grad, final_state_grad):
    x, weight, bias, seq_idx, initial_state = ctx.saved_tensors
    x_grad, weight_grad, bias_grad, state_grad = causal_conv1d_backward_op(
        y_grad, final_state_grad, x, weight, bias, ctx.silu, seq_idx, initial_state
    )
    return (
        x_grad,
        weight_grad,
        None if bias is None else bias_grad,
        None,
        None,
        None if initial_state is None else state_grad.to(initial_state.dtype),
    )


causal_conv1d_op.register_autograd(_backward, setup_context=_setup_context)


def _padded(x: Tensor, width: int, initial_state: Tensor | None) -> Tensor:
    """The inputs with the width-1 before them, (batch, width-1 + length, channel), in the compute dtype."""
    batch, length, channels = x.shape
    padded = x.new_empty((batch, width - 1 + length, channels), dtype=compute_dtype(x))
    padded[:, width - 1 :] = x
    padded[:, : width - 1] = 0.0 if initial_state is None else initial_state
    return padded


def _convolve(padded: Tensor, weight: Tensor, bias: Tensor | None, hidden: list[Tensor] | None) -> Tensor:
    width = weight.shape[1]
    length = padded.shape[1] - width + 1
    taps = weight.to(padded.dtype).t().contiguous()
    y = padded[:, :length] * taps[0]
    for lag in reversed(range(width)):
        tap = width - 1 - lag
        if tap > 0:
            y.addcmul_(padded[:, tap : tap + length], taps[tap])
        if hidden is not None:
            _clear_rows_(y, hidden[lag])
    if bias is not None:
        y += bias.to(y.dtype)
    return y


def _documents(seq_idx: Tensor, width: int) -> Tensor:
    """The ordinal of each position's document, (batch, width-1 + length); the initial state is of document 0."""
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).to(torch.int64)
    return torch.nn.functional.pad(changes.cumsum(dim=1), (width, 0))


def _hidden(seq_idx: Tensor, width: int) -> list[Tensor]:
    """For each lag, the flat (batch, length) positions whose input that many steps ago is of another document."""
    length = seq_idx.shape[1]
    documents = _documents(seq_idx, width)
    here = documents[:, width - 1 :]
    starts = [width - 1 - lag for lag in range(width)]
    return [(documents[:, s : s + length] != here).reshape(-1).nonzero().squeeze(1) for s in starts]


def _hidden_at_end(seq_idx: Tensor, width: int) -> Tensor:
    """Which of the last width-1 inputs (batch, width-1) are not of the last position's document."""
    documents = _documents(seq_idx, width)
    return documents[:, seq_idx.shape[1] :] != documents[:, -1:]


def _clear_rows_(values: Tensor, rows: Tensor) -> None:
    values.view(-1, values.shape[2]).index_fill_(0, rows, 0.0)


def _silu_backward_(grad: Tensor, before: Tensor) -> None:
    """Multiply `grad` in place by the slope of silu at `before`, which is overwritten."""
    gate = torch.sigmoid(before)
    grad.mul_(gate)
    grad.addcmul_(grad, before.mul_(1 - gate))
