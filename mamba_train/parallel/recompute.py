"""Activation checkpointing: what a layer keeps for the backward pass, and what it computes again (arXiv 1604.06174)."""

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mamba_train.config import Recompute
from mamba_train.model.language_model import MambaLM
from mamba_train.model.mamba2_ssm import Mamba2SSM
from mamba_train.model.observe import SCAN_OPERATORS
from mamba_train.model.selective_ssm import SelectiveSSM


def recompute_activations(model: MambaLM, policy: Recompute, device: torch.device, layers: int | None = None) -> None:
    """Make the layers of `model` compute their activations again in the backward pass, as `policy` says.

    layer: only the inputs of a layer are kept. keep_scan: also what the scans return, which are the dearest to
    compute again. scan: all is kept but what the scans of Mamba-1 return and the Δ they read, which are the largest,
    and the states of Mamba-2; in the first `layers` layers, or in all.
    The names of parameters stay as they are.
    """
    if policy is Recompute.auto:
        policy = Recompute.scan if device.type == "cuda" else Recompute.none
    if policy is Recompute.none:
        return
    if policy is Recompute.scan:
        for block in model.blocks()[:layers]:
            for module in block.modules():
                if isinstance(module, SelectiveSSM | Mamba2SSM):
                    module.recompute_scan = True
        return
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
    if policy is Recompute.keep_scan:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_scans)
    for block in model.blocks():
        # Not a wrapping module, which would rename the parameters; hooks of FSDP2 and ZeRO stay outside.
        block.forward = partial(checkpoint, block.forward, **settings)  # type: ignore[method-assign]


def _keep_scans(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    is_scan = isinstance(operator, torch._ops.OpOverload) and operator._schema.name in SCAN_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_scan else CheckpointPolicy.PREFER_RECOMPUTE
