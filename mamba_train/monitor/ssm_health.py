"""Health of the state-space layers: is Δ in its range, is A, and how far back does a layer remember?

A state of a channel (in Mamba-2: of a head) decays by exp(Δ A) per token, so it forgets over 1 / (Δ |A|)
tokens. Δ here is what the scan uses, softplus(dt + dt_bias) (Mamba paper, section 3.2 and algorithm 2).
Two early signs of trouble: Δ at its floor (the state neither takes in nor forgets anything) and Δ so large that even
the slowest state of a channel keeps less than a hundredth over one token (it has no memory left); and the size of the
state itself, which grows before the loss does.

The figures come from the arguments that the operator received (`mamba_train.model.observe`), so they
describe what was computed, under any engine. Quantiles are taken over evenly spaced positions and
channels.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from mamba_train.model.observe import FINAL_STATE, ScanArguments

N_POSITIONS = 16
N_CHANNELS = 128
QUANTILES = {"p05": 0.05, "p50": 0.50, "p95": 0.95}
SIGNS = ("dt_floor_share", "dt_saturated_share", "state_rms")
DT_FLOOR = 1e-4  # below all that the initialisation draws
FORGETS_AT = math.log(100)  # Δ |A| from which on less than 1 % of a state is left after a token


@torch.no_grad()
def ssm_health(calls: Sequence[ScanArguments], layers: Sequence[int] | None = None) -> dict[str, float]:
    """Summarise one forward pass, call i being of layer layers[i] (None: layer i, there being no others).

    Per layer, under `ssm/layer_II/`: dt_p05, dt_p50, dt_p95 (quantiles of Δ), a_min, a_max (of A, so
    negative), memory_p05, memory_p50, memory_p95 (quantiles of 1 / (Δ |A|), in tokens), dt_floor_share and
    dt_saturated_share (of Δ, see above), state_rms (root mean square of the state after the last position). One
    transfer from the device for all layers together.
    """
    if not calls:
        return {}
    values = torch.stack([_layer_health(call) for call in calls]).tolist()
    names = [*(f"dt_{q}" for q in QUANTILES), "a_min", "a_max", *(f"memory_{q}" for q in QUANTILES), *SIGNS]
    layers = range(len(calls)) if layers is None else layers
    return {
        f"ssm/layer_{layer:02d}/{name}": value
        for layer, row in zip(layers, values, strict=True)
        for name, value in zip(names, row, strict=True)
    }


def _layer_health(call: ScanArguments) -> torch.Tensor:
    A = call["A"].float()
    A = A if A.dim() == 2 else A.unsqueeze(1)  # Mamba-2 has one A for all states of a head
    channels = _evenly(A.shape[0], N_CHANNELS, A.device)
    dt = call["dt"].flatten(0, 1)
    dt = dt[_evenly(dt.shape[0], N_POSITIONS, dt.device)][:, channels].float()
    if call["dt_bias"] is not None:
        dt = dt + call["dt_bias"][channels].float()
    if call["dt_softplus"]:
        dt = F.softplus(dt)
    memory = 1.0 / (dt[..., None] * A[channels].abs())
    slowest = A[channels].abs().amin(dim=1)
    signs = [
        (dt < DT_FLOOR).float().mean(),
        (dt * slowest > FORGETS_AT).float().mean(),
        call[FINAL_STATE].float().square().mean().sqrt(),
    ]
    return torch.cat([_quantiles(dt), torch.stack([A.min(), A.max()]), _quantiles(memory), torch.stack(signs)])


def _evenly(length: int, count: int, device: torch.device) -> torch.Tensor:
    """At most `count` indices spread over range(length)."""
    count = min(length, count)
    return torch.arange(count, device=device) * length // count


def _quantiles(values: torch.Tensor) -> torch.Tensor:
    levels = torch.tensor(list(QUANTILES.values()), device=values.device, dtype=values.dtype)
    return torch.quantile(values.flatten(), levels)
