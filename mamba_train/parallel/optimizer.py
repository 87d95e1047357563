"""AdamW with the decay groups of the contract: torch's, and the one launch that takes its place where it can."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.adamw import FusedAdamW, Parameter, unsupported
from mamba_train.config import OptimConfig
from mamba_train.model.contract import decay_split

COPY_INTO = "recorded steps and the update in one launch know where they are: copy into them instead, as `Pieces` do"


def forbid_replacing(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Have what would put other tensors in the place of weights or moments raise RuntimeError."""

    def assign(_module: nn.Module, _state: object, _prefix: str, metadata: dict[str, object], *_: object) -> None:
        if metadata.get("assign_to_params_buffers"):
            raise RuntimeError("load_state_dict(assign=True) would replace weights; " + COPY_INTO)

    def load(*_: object) -> None:
        raise RuntimeError("load_state_dict would replace the moments; " + COPY_INTO)

    model.register_load_state_dict_pre_hook(assign)
    optimizer.register_load_state_dict_pre_hook(load)


def make_optimizer(parameters: dict[str, nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101, algorithm 2) with the decay groups of the contract and a state of zeros."""
    optimizer = adamw(parameters, optim)
    for parameter in parameters.values():
        # torch makes it at the first step; a checkpoint has something to fill before that.
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def adamw(parameters: dict[str, nn.Parameter], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with the decay groups of the contract."""
    decayed, undecayed = decay_split(parameters)
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": optim.weight_decay},
        {"params": [parameters[name] for name in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def fused_adamw(
    optimizer: torch.optim.Optimizer, optim: OptimConfig, copies: Mapping[Tensor, Tensor]
) -> FusedAdamW | None:
    """What does the same with weights and state of `optimizer`, and makes bf16 `copies`; None where it cannot run.

    It takes gradients in the order of the optimiser's groups.
    """
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state, weight = optimizer.state[parameter], local_part(parameter.detach())
            if unsupported(weight):
                return None
            first, second, step = (local_part(state[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
            found.append(Parameter(weight, first, second, step, group["weight_decay"], copies.get(parameter)))
    return FusedAdamW(found, optim.beta1, optim.beta2, optim.eps)


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank has, in the same memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
