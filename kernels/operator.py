"""Registration of operators with PyTorch: what `torch.library.custom_op` does, with less Python around each call.

Small models are bound by the host: a forward and backward through an operator registered by `custom_op` takes some
0.2 ms longer than through one that is not. The difference is checks, for every call, that a result is not an argument
and that defaults are filled in. The operators of this package return new tensors and have no defaults.

Called by itself, and not by its name in `torch.ops`, an operator does not go through PyTorch's dispatcher either,
unless somebody there wants to see the call: a compiler, a mode, a subclass of Tensor, a functional transform, the
profiler; or unless tensors have no values (device meta), whose shapes the dispatcher finds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from kernels.checks import PLAIN


class Operator:
    """An operator of `torch.ops`, with the methods and attributes of `CustomOpDef` that this package uses."""

    def __init__(self, qualified_name: str, function: Callable[..., Any], mutates_args: Iterable[str]) -> None:
        namespace, self._name = qualified_name.split("::")
        self._qualified_name, self._init_fn = qualified_name, function
        self._library = torch.library.Library(namespace, "FRAGMENT")  # which unregisters its operators when it goes
        schema = torch.library.infer_schema(function, mutates_args=tuple(mutates_args))
        self._library.define(self._name + schema, tags=torch.Tag.pt2_compliant_tag)
        self._library.impl(self._name, function, "CompositeExplicitAutograd")
        self._backend_fns: dict[str, Callable[..., Any]] = {}
        self._opoverload = getattr(getattr(torch.ops, namespace), self._name).default
        # What it writes into has versions, which the dispatcher counts.
        self._is_direct = not tuple(mutates_args)
        self._apply: Callable[..., Any] | None = None  # runs a function, which gets the arguments, under autograd

    def __call__(self, *arguments: Any) -> Any:
        if not self._is_direct or torch.compiler.is_compiling() or _is_watched():
            return self._opoverload(*arguments)
        device, requires_grad = None, False
        for argument in arguments:
            if isinstance(argument, Tensor):
                if type(argument) not in PLAIN or argument.is_meta:
                    return self._opoverload(*arguments)
                device = device or argument.device.type
                requires_grad = requires_grad or argument.requires_grad
        function = self._backend_fns.get(device, self._init_fn)  # type: ignore[arg-type]
        if not (requires_grad and torch.is_grad_enabled()):
            return function(*arguments)
        return self._opoverload(*arguments) if self._apply is None else self._apply(function, *arguments)

    def register_kernel(self, device: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Have the decorated function compute the operator on a kind of device."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._backend_fns[device] = function
            self._library.impl(self._name, function, device.upper())
            return function

        return register

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Have the decorated function say of what shapes and dtypes the results are; the last one counts."""
        self._abstract_fn = function
        torch.library.register_fake(self._qualified_name, function, lib=self._library, allow_override=True)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As `CustomOpDef.register_autograd`: both functions get the context of a `torch.autograd.Function`."""
        operator, below = self._opoverload, torch._C._after_autograd_keyset

        def forward(ctx: Any, function: Callable[..., Any], *arguments: Any) -> Any:
            result = function(*arguments)
            setup_context(ctx, arguments, result)
            return result

        def all_backward(ctx: Any, *grads: Tensor | None) -> Any:
            return None, *backward(ctx, *grads)

        methods = {"forward": staticmethod(forward), "backward": staticmethod(all_backward)}
        self._apply = type(f"{self._name}_autograd", (torch.autograd.Function,), methods).apply  # type: ignore[attr-defined]

        def with_autograd(keyset: Any, *arguments: Any) -> Any:
            def redispatched(*arguments: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    return operator.redispatch(keyset & below, *arguments)

            if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
                return self._apply(redispatched, *arguments)  # type: ignore[misc]
            return redispatched(*arguments)

        self._library.impl(self._name, with_autograd, "Autograd", with_keyset=True)


def _is_watched() -> bool:
    """Whether calls of operators are seen by somebody besides autograd."""
    c = torch._C
    return bool(
        c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._are_functorch_transforms_active()
        or c._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def operator(qualified_name: str, *, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Register the decorated function, whose annotations make the schema, as an operator; it runs on every device."""
    return lambda function: Operator(qualified_name, function, mutates_args)
