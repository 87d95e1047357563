"""The norms' operators on CUDA devices: layouts, buffers, launches of the Triton kernels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels.dispatch import alignment, early_start, processors, shared_bytes, triton_unsupported
from kernels.launcher import Launch, device_of, remembered, sum_launch
from kernels.rms_norm.shapes import MAX_SIZE, LoopShape, Shape, backward_shape, forward_shape

MANY = 2**20  # bytes of shared memory, more than a program uses


def unsupported(x: Tensor, size: int) -> str | None:
    """Why the kernels cannot run on these inputs, None when they can. size: channels of a group."""
    if size > MAX_SIZE:
        return f"{size} channels are more than {MAX_SIZE}"
    return triton_unsupported(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The operator `rms_norm`: y and 1 / rms."""
    y, _, inverse_rms = _forward(x, None, None, weight, eps, x.shape[-1])
    return y, inverse_rms


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `add_rms_norm`: y, the sum in fp32, and 1 / rms."""
    return _forward(x, residual, None, weight, eps, x.shape[-1], with_total=True)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> tuple[Tensor, Tensor]:
    """The operator `gated_rms_norm`: y and 1 / rms of each group."""
    y, _, inverse_rms = _forward(x, None, z, weight, eps, group_size, norm_before_gate)
    return y, inverse_rms.unsqueeze(-1)


def rms_norm_backward(
    y_grad: Tensor,
    through: Tensor | None,
    x: Tensor,
    inverse_rms: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    with_total: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `rms_norm_backward`: gradients of x in `dtype`, of the sum in fp32 or empty, and of weight."""
    x_grad, total_grad, _, weight_grad = _backward(
        y_grad, through, x, None, weight, inverse_rms, x.shape[-1], dtype, with_total=with_total
    )
    return x_grad, x.new_empty((0,), dtype=torch.float32) if total_grad is None else total_grad, weight_grad


def gated_rms_norm_backward(
    y_grad: Tensor, x: Tensor, z: Tensor, weight: Tensor, inverse_rms: Tensor, norm_before_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `gated_rms_norm_backward`: gradients of x, z and weight."""
    size = x.shape[-1] // inverse_rms.shape[-2]
    x_grad, _, z_grad, weight_grad = _backward(
        y_grad, None, x, z, weight, inverse_rms, size, x.dtype, norm_before_gate=norm_before_gate
    )
    assert z_grad is not None
    return x_grad, z_grad, weight_grad


def _forward(
    x: Tensor,
    residual: Tensor | None,
    z: Tensor | None,
    weight: Tensor,
    eps: float,
    size: int,
    norm_before_gate: bool = False,
    with_total: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    shape, channels, device = x.shape, x.shape[-1], x.device
    groups = channels // size
    y = torch.empty(shape, dtype=x.dtype, device=device)
    total = torch.empty(shape, dtype=torch.float32, device=device) if with_total else None
    inverse_rms = torch.empty((*shape[:-1], groups), dtype=torch.float32, device=device)
    x, residual, z, weight = _rows(x), _rows(residual), _rows(z), weight.contiguous()  # type: ignore[assignment]
    strides = tuple([0 if t is None else t.stride(0) for t in (x, residual, z)])
    widths = [t.element_size() for t in (x, residual, z, total, y) if t is not None]
    align = _alignment(size, strides, widths)
    cut = forward_shape(size, z is not None, plain=z is None and total is None)
    early = early_start(x)["PDL"]
    if x.shape[0]:
        moved = x.numel() * sum(widths)
        asking = _asking(x.device.index, moved, cut) if early and size >= 16 else 0  # asked for by 16 bytes
        launch = _forward_launch(
            x.shape[0], size, groups, strides, align, asking, float(eps), norm_before_gate, early, cut
        )
        with device_of(x):
            launch(x, residual, z, weight, y, total, inverse_rms)
    return y, y if total is None else total, inverse_rms


@remembered
def _forward_launch(
    rows: int,
    size: int,
    groups: int,
    strides: tuple[int, ...],
    align: int,
    asking: int,
    eps: float,
    norm_before_gate: bool,
    early: bool,
    shape: Shape,
) -> Launch:
    """strides: of the rows of x, residual and z."""
    from kernels.rms_norm.triton_kernels import forward_kernel

    return Launch(
        forward_kernel,
        (-(-rows // shape.rows) * groups, 1),
        (*(stride // align for stride in strides), rows, size // align, groups, asking, eps),
        (norm_before_gate, align, -(-size // shape.block), shape.block, shape.rows, early),
        shape.warps,
        early,
    )


def _backward(
    y_grad: Tensor,
    through: Tensor | None,
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    inverse_rms: Tensor,
    size: int,
    dtype: torch.dtype,
    norm_before_gate: bool = False,
    with_total: bool = False,
    z_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """z_grad: where that gradient goes, rows at equal distances."""
    shape, channels, device = x.shape, x.shape[-1], x.device
    groups = channels // size
    x_grad = torch.empty(shape, dtype=dtype, device=device)
    total_grad = torch.empty(shape, dtype=torch.float32, device=device) if with_total else None
    if z is not None and z_grad is None:
        z_grad = torch.empty(shape, dtype=z.dtype, device=device)
    weight_grad = torch.empty((channels,), dtype=weight.dtype, device=device)
    tensors = y_grad, through, x, z = [_rows(t) for t in (y_grad, through, x, z)]  # type: ignore[assignment]
    z_grad_rows = None if z_grad is None else z_grad.view(-1, channels)
    strides = tuple([0 if t is None else t.stride(0) for t in (*tensors, z_grad_rows)])
    widths = [t.element_size() for t in tensors if t is not None]
    align = _alignment(size, strides, widths)
    cut = backward_shape(size, z is not None, sum(widths), shared_bytes(device.index) if x.is_cuda else MANY)
    programs, span = _programs(x, groups, cut)
    if not programs:
        return x_grad, total_grad, z_grad, weight_grad.zero_()
    parts = torch.empty((programs, channels), dtype=torch.float32, device=device)
    launch = _backward_launch(programs, x.shape[0], size, groups, span, strides, align, norm_before_gate, cut)
    with device_of(x):
        launch(y_grad, through, x, z, weight.contiguous(), inverse_rms, x_grad, total_grad, z_grad, parts)
        sum_launch(programs, channels, 1)(parts, weight_grad, None)
    return x_grad, total_grad, z_grad, weight_grad


@remembered
def _backward_launch(
    programs: int,
    rows: int,
    size: int,
    groups: int,
    span: int,
    strides: tuple[int, ...],
    align: int,
    norm_before_gate: bool,
    shape: LoopShape,
) -> Launch:
    """programs: of a group; strides: of the rows of the gradient of y, `through`, x, z and the gradient of z."""
    from kernels.rms_norm.triton_kernels import backward_kernel

    return Launch(
        backward_kernel,
        (programs * groups, 1),
        (*(stride // align for stride in strides), rows, size // align, groups, span),
        (norm_before_gate, align, -(-size // shape.block), shape.block, shape.rows, shape.stages),
        shape.warps,
    )


def _asking(device: int | None, moved: int, shape: Shape) -> int:
    """How many programs ask for their rows before they wait: those that start early, if the cache can't have them.

    moved: bytes that the kernel reads and writes.
    """
    return 0 if moved <= _cache_bytes(device) else processors(device) * min(32, 64 // shape.warps)


@functools.cache
def _cache_bytes(device: int | None) -> int:
    return torch.cuda.get_device_properties(device or 0).L2_cache_size


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(row, channel) with neighbouring channels side by side: a view, or a copy where there is none."""
    if tensor is None:
        return None
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _programs(x: Tensor, groups: int, launch: LoopShape) -> tuple[int, int]:
    """How many programs share the rows of a group, and how many rows each gets: a multiple of what it has at once."""
    rows = x.shape[0]
    most = max(1, (processors(x.device.index) if x.is_cuda else 1) * launch.programs // groups)
    span = -(-rows // (most * launch.rows)) * launch.rows
    return (-(-rows // span) if rows else 0), span


def _alignment(size: int, strides: tuple[int, ...], widths: list[int]) -> int:
    """Elements that rows are read in at a time: the same for all, or values would have to change threads.

    widths: bytes of an element of each tensor.
    """
    return alignment(size, 16 // max(widths), *strides)
