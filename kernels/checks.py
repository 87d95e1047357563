"""Argument checks shared by the operators: one line that names the argument, its shape, and what was expected."""

import functools
from collections.abc import Callable, Sequence

import torch

PLAIN = (torch.Tensor, torch.nn.Parameter)
KINDS = 1024  # that are remembered


def once_for_each_kind(check: Callable[..., None]) -> Callable[..., None]:
    """Have `check`, of tensors or None, run only for shapes, dtypes and devices that have not passed it."""
    passed: set[tuple[object, ...]] = set()

    @functools.wraps(check)
    def checked(*tensors: torch.Tensor | None) -> None:
        if torch.compiler.is_compiling() or type(tensors[0]) not in PLAIN:  # sizes may be symbols
            return check(*tensors)
        kinds = tuple([None if t is None else (t.shape, t.dtype, t.device) for t in tensors])
        if kinds not in passed:
            check(*tensors)
            if len(passed) < KINDS:
                passed.add(kinds)

    return checked


def check_tensor(function: str, name: str, value: torch.Tensor, expected: Sequence[tuple[str, int | None]]) -> None:
    """Raise ValueError unless `value` has the expected axes.

    `expected` names each axis and gives its size; None accepts any size.
    """
    fits = value.dim() == len(expected) and all(
        size is None or actual == size for actual, (_, size) in zip(value.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in expected)
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, expected ({wanted})")


def check_not_empty(function: str, name: str, value: torch.Tensor) -> None:
    """Raise ValueError when an axis of `value` has no elements."""
    if value.numel() == 0:
        raise ValueError(f"{function}: {name} has shape {tuple(value.shape)}, expected at least 1 along every axis")


def check_floating(function: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is not of a real floating dtype."""
    for name, value in tensors.items():
        if value is not None and not value.is_floating_point():
            raise ValueError(
                f"{function}: {name} has dtype {value.dtype} and shape {tuple(value.shape)}, "
                "expected a real floating dtype"
            )


def check_same_device(function: str, reference: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError naming the first tensor that is not on the device of the one called `reference`."""
    first = tensors[reference]
    assert first is not None
    for name, value in tensors.items():
        if value is not None and value.device != first.device:
            raise ValueError(
                f"{function}: {name} of shape {tuple(value.shape)} is on {value.device}, "
                f"expected {first.device} like {reference}"
            )


def check_seq_idx(function: str, seq_idx: torch.Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `seq_idx` holds one integer for each position."""
    check_tensor(function, "seq_idx", seq_idx, [("batch", batch), ("length", length)])
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{function}: seq_idx has dtype {seq_idx.dtype} and shape {tuple(seq_idx.shape)}, expected int32"
        )


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype an operator works in: fp64 for fp64 activations, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Return whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_in_place(operator: str, state: torch.Tensor, *arguments: torch.Tensor | None) -> None:
    """Raise ValueError unless a new state can be written where `state` lies."""
    if needs_gradient(state, *arguments):
        raise ValueError(f"{operator}: in_place=True keeps nothing for a backward pass; call it under torch.no_grad()")
    if not state.is_contiguous():
        raise ValueError(
            f"{operator}: state has strides {state.stride()}, expected a contiguous one with in_place=True"
        )


def narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in another dtype; in fp16 nothing becomes infinite, but the largest number there is."""
    if dtype == torch.float16:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)
