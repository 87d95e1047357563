"""A model to be used, not trained."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mamba_train.config import ModelConfig
from mamba_train.model.contract import rule_for
from mamba_train.model.language_model import MambaLM


def inference_model(
    config: ModelConfig, tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> MambaLM:
    """The model of these weights on `device`, computing in `dtype`, without gradients.

    config: resolved. The SSM parameters stay fp32, as the table of `mamba_train.model.contract` says: a state that
    decays by rounded rates is another one after a thousand tokens.
    """
    with torch.device("meta"):
        model = MambaLM(config)
    kept = {name: torch.float32 if rule_for(name).fp32_forward else dtype for name in tensors}
    # assign: these tensors become the parameters, nothing is copied once more.
    model.load_state_dict({name: tensor.to(device, kept[name]) for name, tensor in tensors.items()}, assign=True)
    return model.requires_grad_(False).eval()
