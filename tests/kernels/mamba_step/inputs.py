"""Random arguments of the step."""

import torch
from torch import Tensor


def draw(
    batch: int, channels: int, rank: int, states: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """x and z are halves of one tensor, as in_proj leaves them; matrices in `dtype`, the rest in fp32."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    x, z = normal(batch, 2 * channels).to(dtype).chunk(2, dim=-1)
    return {
        "conv_state": normal(batch, width - 1, channels).to(dtype),
        "scan_state": normal(batch, channels, states),
        "x": x,
        "z": z,
        "conv_weight": normal(channels, width),
        "conv_bias": normal(channels),
        "x_proj_weight": (normal(rank + 2 * states, channels) / channels**0.5).to(dtype),
        "dt_proj_weight": (normal(channels, rank) / rank**0.5).to(dtype),
        "dt_bias": normal(channels) - 4,
        "A_log": normal(channels, states),
        "D": normal(channels),
    }
