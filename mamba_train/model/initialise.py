"""Draw the initial parameters so that they depend on nothing but the seed and their own names.

Each parameter has a generator of its own on the CPU, seeded by a hash of (seed, name), and is drawn
whole and in fp32 before it goes to its device. So any engine on any number of ranks starts from the
same bits, and adding a layer does not change the draws of the others.

The distributions are those of the Mamba reference implementation (arXiv 2312.00752, section 3.6,
arXiv 2405.21060, and their public code): Δ bias by the inverse softplus of a log-uniform step size;
A = -(1..N) in each channel of Mamba-1, -A uniform in each head of Mamba-2; D = 1; output projections
scaled by 1/sqrt(number of residual branches), of which a layer with an MLP has two.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from mamba_train.config import ModelConfig
from mamba_train.model.contract import Role, rule_for


def parameter_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the parameter `name` alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def draw(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter: fp32, on the CPU, of the full shape."""
    generator = parameter_generator(seed, name)
    role = rule_for(name).role
    if role is Role.embedding:
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)
    if role is Role.norm or role is Role.skip:
        return torch.ones(shape)
    if role is Role.a_log:
        if len(shape) == 1:  # Mamba-2: one A for each head
            A = torch.empty(shape).uniform_(config.A_init_min, config.A_init_max, generator=generator)
            return A.log()
        states = torch.arange(1, shape[-1] + 1, dtype=torch.float32)
        return states.log().expand(shape).clone()
    if role is Role.dt_bias:
        return _draw_dt_bias(shape, config, generator)
    bound = _uniform_bound(name, role, shape, config)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def initialise_(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model` (already on its device, not meta) with its initial value.

    Raises:
        RuntimeError: when the model has a buffer (which no rule would fill) or a meta parameter.
    """
    for name, _ in model.named_buffers():
        raise RuntimeError(f"buffer {name} has no initialisation rule")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RuntimeError(f"parameter {name} is on the meta device and cannot be filled")
        parameter.copy_(draw(name, parameter.shape, config, seed))


def _uniform_bound(name: str, role: Role, shape: torch.Size, config: ModelConfig) -> float:
    """Half-width of the symmetric uniform distribution of a matrix or of the convolution."""
    if role in (Role.conv_weight, Role.conv_bias):
        # Each channel sees as many inputs as the filter is wide.
        return 1 / math.sqrt(config.d_conv if ".ssm." in name else config.attention_d_conv)
    bound = 1 / math.sqrt(shape[-1])
    if role is Role.dt_projection:
        return bound * config.dt_scale  # keeps the variance of Δ independent of dt_rank
    if role is Role.residual_out:
        branches = config.n_layer * (2 if config.d_intermediate else 1)
        return bound / math.sqrt(branches)
    return bound


def _draw_dt_bias(shape: torch.Size, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """softplus(dt_bias) is log-uniform on [dt_min, dt_max]."""
    low, high = math.log(config.dt_min), math.log(config.dt_max)
    dt = torch.exp(torch.rand(shape, generator=generator) * (high - low) + low)
    dt = dt.clamp(min=config.dt_init_floor)
    return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
