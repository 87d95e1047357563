"""The step of a model for a few sequences, in three (Mamba-2) or four kernels a layer.

It computes what `MambaLM.step` does, from the weights where they lie: for inference on one device, where no engine has
put a hook between a module and its weights.
"""

from torch import Tensor
from torch.nn import functional as F

from kernels import decode
from mamba_train.config import MixerKind, layer_mixers
from mamba_train.model.block import Block
from mamba_train.model.language_model import MambaLM
from mamba_train.model.mixers import LayerState, Mamba1Mixer, Mamba2Mixer
from mamba_train.model.selective_ssm import SSMState


def can_fuse(model: MambaLM, batch_size: int) -> bool:
    """Whether `fused_step` computes the step of this model for so many sequences."""
    config, weight = model.config, model.embedding.weight
    d_inner = config.expand * config.d_model
    sizes = [config.d_model, d_inner // (config.n_groups if MixerKind.mamba2 in layer_mixers(config) else 1)]
    if config.d_intermediate:
        sizes.append(config.d_intermediate)
    has_kernels = MixerKind.attention not in layer_mixers(config) and not config.time_invariant
    return has_kernels and config.d_conv > 1 and decode.supports(weight[:batch_size], *sizes)


def fused_step(model: MambaLM, token: Tensor, state: list[LayerState]) -> Tensor:
    """Logits (batch, padded vocabulary) for token (batch,); `state` becomes the new one. Needs torch.no_grad()."""
    hidden, residual = F.embedding(token, model.embedding.weight), None
    for block, layer in zip(model.blocks(), state, strict=True):
        assert isinstance(layer, SSMState), "can_fuse refuses attention"
        hidden, residual = _layer(block, hidden, residual, layer)
    head = model.embedding if model.lm_head is None else model.lm_head
    return decode.linear(hidden, head.weight, model.norm.weight, model.norm.eps, residual=residual)[0]


def _layer(block: Block, hidden: Tensor, residual: Tensor | None, state: SSMState) -> tuple[Tensor, Tensor]:
    mixer, norm = block.mixer, block.norm
    assert isinstance(mixer, Mamba1Mixer | Mamba2Mixer)
    weight = mixer.in_proj.weight
    projected, total = decode.linear(hidden, weight, norm.weight, norm.eps, residual=residual, return_sum=True)
    hidden = _mamba1(mixer, projected, state) if isinstance(mixer, Mamba1Mixer) else _mamba2(mixer, projected, state)
    if block.has_mlp:
        norm, mlp = block.mlp_norm, block.mlp
        both, total = decode.linear(hidden, mlp.in_proj.weight, norm.weight, norm.eps, residual=total, return_sum=True)
        value, gate = both.chunk(2, dim=-1)
        hidden, _ = decode.linear(value, mlp.out_proj.weight, z=gate)
    assert total is not None
    return hidden, total


def _mamba1(mixer: Mamba1Mixer, projected: Tensor, state: SSMState) -> Tensor:
    ssm = mixer.ssm
    x, z = projected.chunk(2, dim=-1)
    x, parts = decode.conv_project(state.conv, x, ssm.conv_weight, ssm.conv_bias, ssm.x_proj_weight)
    y = decode.dt_scan(state.scan, x, z, parts, ssm.dt_proj_weight, ssm.dt_bias, ssm.A_log, ssm.D)
    return decode.linear(y, mixer.out_proj.weight)[0]


def _mamba2(mixer: Mamba2Mixer, projected: Tensor, state: SSMState) -> Tensor:
    ssm = mixer.ssm
    z, x, dt = ssm.parts(projected)
    y = decode.conv_ssd(state.scan, state.conv, x, dt, ssm.conv_weight, ssm.conv_bias, ssm.A_log, ssm.D, ssm.dt_bias)
    return decode.linear(
        *(y, mixer.out_proj.weight, ssm.norm_weight, ssm.norm_eps),
        z=z,
        groups=ssm.group_shape[0],
        conv_state=state.conv,
        conv_input=x,
    )[0]
