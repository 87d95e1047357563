"""The operators written as their definitions say, one position after another, and inputs to compare on."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LENGTHS = [1, 2, 3, 17, 63, 64, 65, 200]
Inputs = dict[str, Tensor]


def documents(seq_idx: Tensor | None, batch: int, length: int) -> list[list[int]]:
    """The ordinal of each position's document: any change of seq_idx begins another."""
    if seq_idx is None:
        return [[0] * length for _ in range(batch)]
    ordinals = []
    for row in seq_idx.tolist():
        ordinal, previous, out = 0, row[0], []
        for value in row:
            ordinal += value != previous
            previous = value
            out.append(ordinal)
        ordinals.append(out)
    return ordinals


def scan_loop(inputs: Mapping[str, Tensor], dt_softplus: bool = True) -> tuple[Tensor, Tensor]:
    """The selective scan by its recurrence; differentiable by autograd."""
    x, A, seq_idx = inputs["x"], inputs["A"], inputs.get("seq_idx")
    batch, length, channels = x.shape
    ordinals = documents(seq_idx, batch, length)
    ys, ends = [], []
    for b in range(batch):
        h = inputs["initial_state"][b] if "initial_state" in inputs else x.new_zeros(channels, A.shape[1])
        rows = []
        for t in range(length):
            delta = inputs["dt"][b, t]
            if "dt_bias" in inputs:
                delta = delta + inputs["dt_bias"]
            if dt_softplus:
                delta = F.softplus(delta)
            if t > 0 and ordinals[b][t] != ordinals[b][t - 1]:
                h = torch.zeros_like(h)
            h = torch.exp(delta[:, None] * A) * h + (delta * x[b, t])[:, None] * inputs["B"][b, t]
            y = (h * inputs["C"][b, t]).sum(-1)
            if "D" in inputs:
                y = y + inputs["D"] * x[b, t]
            if "z" in inputs:
                y = y * F.silu(inputs["z"][b, t])
            rows.append(y)
        ys.append(torch.stack(rows))
        ends.append(h)
    return torch.stack(ys), torch.stack(ends)


def conv_loop(inputs: Mapping[str, Tensor], silu: bool) -> tuple[Tensor, Tensor]:
    """The causal convolution by its definition, and its last width-1 inputs."""
    x, weight, seq_idx = inputs["x"], inputs["weight"], inputs.get("seq_idx")
    (batch, length, channels), width = x.shape, weight.shape[1]
    ordinals = documents(seq_idx, batch, length)

    def source(b: int, position: int, document: int) -> Tensor:
        if (ordinals[b][position] if position >= 0 else 0) != document:
            return x.new_zeros(channels)
        if position >= 0:
            return x[b, position]
        return inputs["initial_state"][b, width - 1 + position] if "initial_state" in inputs else x.new_zeros(channels)

    ys, states = [], []
    for b in range(batch):
        for t in range(length):
            y = x.new_zeros(channels) if "bias" not in inputs else inputs["bias"]
            for lag in range(width):
                y = y + weight[:, width - 1 - lag] * source(b, t - lag, ordinals[b][t])
            ys.append(F.silu(y) if silu else y)
        states += [source(b, length - lag, ordinals[b][-1]) for lag in range(width - 1, 0, -1)]
    state = torch.stack(states) if states else x.new_zeros(0)
    return torch.stack(ys).view(batch, length, channels), state.view(batch, width - 1, channels)


def scan_inputs(
    batch: int,
    length: int,
    channels: int = 3,
    states: int = 4,
    *,
    packed: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Random inputs of the selective scan with every option in use."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": draw(batch, length, channels),
        "dt": draw(batch, length, channels),
        "A": -draw(channels, states).exp(),
        "B": draw(batch, length, states),
        "C": draw(batch, length, states),
        "D": draw(channels),
        "z": draw(batch, length, channels),
        "dt_bias": draw(channels) - 1,
        "initial_state": draw(batch, channels, states),
    }
    inputs = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    return inputs | ({"seq_idx": random_documents(batch, length, generator)} if packed else {})


def random_documents(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Numbers of documents of about five positions; a number may come again later, as another document."""
    changes = torch.rand(batch, length, generator=generator) < 0.2
    return (changes.cumsum(dim=1) % 3).to(torch.int32)


def floating(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    return [value for value in inputs.values() if value.is_floating_point()]


def gradients(outputs: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Inputs:
    """Gradients of a fixed random combination of the outputs, by name; 0 where an input is not used."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    leaves = {name: value for name, value in inputs.items() if value.requires_grad}
    total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def assert_all_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float, atol: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def largest_tensor_in(function):  # type: ignore[no-untyped-def]
    """Run `function()` and return the element count of the largest tensor any operation in it made."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.numel = max(self.numel, leaf.numel())
            return out

    with Largest() as mode:
        function()
    return mode.numel
