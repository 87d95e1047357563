"""See what the scan of each layer really receives: the selective scan of Mamba-1, SSD of Mamba-2.

A TorchDispatchMode stands below autograd, autocast and every wrapper of an engine, so the tensors it
records are the ones the operator computes with, not the ones that are stored somewhere. The audit
of the SSM parameters and the SSM health metrics both read them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SCAN_OPERATORS = ("mamba_train::selective_scan", "mamba_train::ssd")

FINAL_STATE = "final_state"

ScanArguments = dict[str, Any]
"""The arguments of one call by their name in the operator's schema, defaults filled in; and what FINAL_STATE names, the
state after the last position."""


@contextmanager
def observe_scans() -> Iterator[list[ScanArguments]]:
    """Record the arguments of each call of a scan made inside the `with` block, in order.

    Yields the list that fills while the block runs: one entry per Mamba layer and forward pass. The
    activations are the operator's own, detached and without copies, so drop the list before the next
    step: it keeps them alive.
    """
    calls: list[ScanArguments] = []
    with _ScanRecorder(calls):
        yield calls


class _ScanRecorder(TorchDispatchMode):
    def __init__(self, calls: list[ScanArguments]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not (isinstance(func, torch._ops.OpOverload) and func._schema.name in SCAN_OPERATORS):
            return func(*args, **kwargs)
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        asks = {"with_final_state": True} if "with_final_state" in named else {}  # a caller may do without
        result = func(**named | asks)
        # Both operators return y and the state after the last position first.
        call = {**_arguments_by_name(func, args, kwargs), FINAL_STATE: result[1].detach()}
        self._calls.append(call)
        return result


def _arguments_by_name(func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ScanArguments:
    named: ScanArguments = {}
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
        named[argument.name] = _recorded(value) if isinstance(value, torch.Tensor) else value
    return named


def _recorded(tensor: torch.Tensor) -> torch.Tensor:
    """What the record keeps: not the autograd graph of the step; of parameters, which are small, a copy.

    An engine that gathers a parameter for the forward pass frees it right after the call.
    """
    tensor = tensor.detach()
    return tensor.clone() if tensor.dim() <= 2 else tensor
