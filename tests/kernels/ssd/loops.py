"""SSD written as its definition says, one position after another, and inputs to compare on."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.loops import Inputs, documents, random_documents


def ssd_loop(
    inputs: Mapping[str, Tensor], dt_softplus: bool = True, dt_limit: tuple[float, float] = (0.0, float("inf"))
) -> tuple[Tensor, Tensor]:
    """SSD by its recurrence; differentiable by autograd."""
    x, A, B, C = inputs["x"], inputs["A"], inputs["B"], inputs["C"]
    batch, length, heads, head_dim = x.shape
    B, C = (v.repeat_interleave(heads // v.shape[2], dim=2) for v in (B, C))
    ordinals = documents(inputs.get("seq_idx"), batch, length)
    ys, ends = [], []
    for b in range(batch):
        h = inputs["initial_state"][b] if "initial_state" in inputs else x.new_zeros(heads, head_dim, B.shape[3])
        rows = []
        for t in range(length):
            delta = inputs["dt"][b, t]
            if "dt_bias" in inputs:
                delta = delta + inputs["dt_bias"]
            if dt_softplus:
                delta = F.softplus(delta)
            delta = delta.clamp(*dt_limit)
            if t > 0 and ordinals[b][t] != ordinals[b][t - 1]:
                h = torch.zeros_like(h)
            h = torch.exp(delta * A)[:, None, None] * h + torch.einsum("h,hp,hn->hpn", delta, x[b, t], B[b, t])
            y = torch.einsum("hpn,hn->hp", h, C[b, t])
            if "D" in inputs:
                D = inputs["D"]
                y = y + (D if D.dim() == 2 else D[:, None]) * x[b, t]
            if "z" in inputs:
                y = y * F.silu(inputs["z"][b, t])
            rows.append(y)
        ys.append(torch.stack(rows))
        ends.append(h)
    return torch.stack(ys), torch.stack(ends)


def ssd_inputs(
    batch: int,
    length: int,
    heads: int = 4,
    head_dim: int = 3,
    groups: int = 2,
    states: int = 5,
    *,
    packed: bool = False,
    wide_skip: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Random inputs of SSD with every option in use."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": draw(batch, length, heads, head_dim),
        "dt": draw(batch, length, heads),
        "A": -draw(heads).exp(),
        "B": draw(batch, length, groups, states),
        "C": draw(batch, length, groups, states),
        "D": draw(heads, head_dim) if wide_skip else draw(heads),
        "z": draw(batch, length, heads, head_dim),
        "dt_bias": draw(heads) - 1,
        "initial_state": draw(batch, heads, head_dim, states),
    }
    inputs = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    return inputs | ({"seq_idx": random_documents(batch, length, generator)} if packed else {})
