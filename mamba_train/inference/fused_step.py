"""The step of a model in few kernels: for a few sequences three (Mamba-2) or four a layer, for many six or seven.

It computes what `MambaLM.step` does, from the weights where they lie: for inference on one device, where no engine has
put a hook between a module and its weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import decode
from kernels.causal_conv1d import causal_conv1d_step
from kernels.ssd import ssd_step
from mamba_train.config import MixerKind, layer_mixers
from mamba_train.model.block import Block, RMSNorm
from mamba_train.model.language_model import MambaLM
from mamba_train.model.mamba2_ssm import Mamba2SSM
from mamba_train.model.mixers import LayerState, Mamba1Mixer, Mamba2Mixer
from mamba_train.model.selective_ssm import SelectiveSSM, SSMState


def can_fuse(model: MambaLM, batch_size: int) -> bool:
    """Whether `fused_step` computes the step of this model for so many sequences."""
    config, weight = model.config, model.embedding.weight
    mixers = layer_mixers(config)
    if MixerKind.attention in mixers or config.time_invariant or config.d_conv < 2 or not decode.supports(weight):
        return False
    if batch_size > decode.MAX_BATCH:
        return weight.dtype != torch.float32  # whose products tensor cores would round
    d_inner = config.expand * config.d_model
    sizes = [config.d_model, d_inner // (config.n_groups if MixerKind.mamba2 in mixers else 1)]
    return all(decode.holds(size) for size in [*sizes, config.d_intermediate or 1])


def fused_step(model: MambaLM, token: Tensor, state: list[LayerState]) -> Tensor:
    """Logits (batch, padded vocabulary) for token (batch,); `state` becomes the new one. Needs torch.no_grad()."""
    step = _few if len(token) <= decode.MAX_BATCH else _many
    head = (model.embedding if model.lm_head is None else model.lm_head).weight
    return step(model, F.embedding(token, model.embedding.weight), state, head)


def _few(model: MambaLM, hidden: Tensor, state: list[LayerState], head: Tensor) -> Tensor:
    residual = None
    blocks = model.blocks()
    next_weights = [*(_mixer(block).in_proj.weight for block in blocks[1:]), head]
    for block, layer_state, ahead in zip(blocks, state, next_weights, strict=True):
        assert isinstance(layer_state, SSMState), "can_fuse refuses attention"
        hidden, residual = _layer(block, hidden, residual, layer_state, ahead)
    return decode.linear(hidden, head, model.norm.weight, model.norm.eps, residual=residual)[0]


def _many(model: MambaLM, hidden: Tensor, state: list[LayerState], head: Tensor) -> Tensor:
    parts, residual = hidden.unsqueeze(0), None
    for block, layer_state in zip(model.blocks(), state, strict=True):
        assert isinstance(layer_state, SSMState), "can_fuse refuses attention"
        parts, residual = _layer_of_many(block, parts, residual, layer_state)
    hidden, _ = decode.normed(parts, residual, model.norm.weight, model.norm.eps)
    return F.linear(hidden, head)


def _mixer(block: Block) -> Mamba1Mixer | Mamba2Mixer:
    assert isinstance(block.mixer, Mamba1Mixer | Mamba2Mixer), "can_fuse refuses others"
    return block.mixer


def _layer(
    block: Block, hidden: Tensor, residual: Tensor | None, state: SSMState, ahead: Tensor
) -> tuple[Tensor, Tensor]:
    """ahead: the matrix that the next layer begins with."""
    mixer = _mixer(block)
    projected, total = _normed_linear(hidden, residual, block.norm, mixer.in_proj.weight)
    after = None if block.has_mlp else ahead
    if isinstance(mixer, Mamba1Mixer):
        hidden = _mamba1(mixer, projected, state, after)
    else:
        hidden = _mamba2(mixer, projected, state, after)
    if block.has_mlp:
        both, total = _normed_linear(hidden, total, block.mlp_norm, block.mlp.in_proj.weight)
        value, gate = both.chunk(2, dim=-1)
        hidden, _ = decode.linear(value, block.mlp.out_proj.weight, z=gate, ahead=ahead)
    return hidden, total


def _layer_of_many(block: Block, parts: Tensor, residual: Tensor | None, state: SSMState) -> tuple[Tensor, Tensor]:
    """parts (part, batch, d_model): their sum is what `hidden` is elsewhere."""
    mixer = _mixer(block)
    hidden, total = decode.normed(parts, residual, block.norm.weight, block.norm.eps)
    if isinstance(mixer, Mamba1Mixer):
        y = _many_mamba1(mixer.ssm, decode.product(hidden, mixer.in_proj.weight), state)
        parts = decode.product_in_parts(y, mixer.out_proj.weight)
    else:  # cuBLAS's products are the faster ones between kernels that memory keeps busy
        y = _many_mamba2(mixer.ssm, F.linear(hidden, mixer.in_proj.weight), state)
        parts = decode.library_product_in_parts(y, mixer.out_proj.weight)
    if block.has_mlp:
        hidden, total = decode.normed(parts, total, block.mlp_norm.weight, block.mlp_norm.eps)
        value, gate = decode.product(hidden, block.mlp.in_proj.weight).chunk(2, dim=-1)
        parts = decode.product_in_parts(value * F.silu(gate), block.mlp.out_proj.weight)
    return parts, total


def _many_mamba1(ssm: SelectiveSSM, projected: Tensor, state: SSMState) -> Tensor:
    x, z = projected.chunk(2, dim=-1)
    x, _ = causal_conv1d_step(state.conv, x, ssm.conv_weight, ssm.conv_bias, activation="silu", in_place=True)
    return decode.dt_scan_many(state.scan, x, z, ssm.x_proj_weight, ssm.dt_proj_weight, ssm.dt_bias, ssm.A_log, ssm.D)


def _many_mamba2(ssm: Mamba2SSM, projected: Tensor, state: SSMState) -> Tensor:
    z, x, dt = ssm.parts(projected)
    x, _ = causal_conv1d_step(state.conv, x, ssm.conv_weight, ssm.conv_bias, activation="silu", in_place=True)
    x, B, C = x.split(ssm.split_sizes, dim=-1)
    x, B, C = x.unflatten(-1, ssm.head_shape), B.unflatten(-1, ssm.group_shape), C.unflatten(-1, ssm.group_shape)
    y, _ = ssd_step(state.scan, x, dt, ssm.A_log, B, C, ssm.D, dt_bias=ssm.dt_bias, A_is_log=True, in_place=True)
    return decode.gated_normed(y.flatten(-2), z, ssm.norm_weight, ssm.norm_eps, ssm.group_shape[0])


def _normed_linear(hidden: Tensor, residual: Tensor | None, norm: RMSNorm, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a projection makes of the norm of hidden + residual, and that sum in fp32."""
    y, total = decode.linear(hidden, weight, norm.weight, norm.eps, residual=residual, return_sum=True)
    assert total is not None
    return y, total


def _mamba1(mixer: Mamba1Mixer, projected: Tensor, state: SSMState, ahead: Tensor | None) -> Tensor:
    ssm = mixer.ssm
    x, z = projected.chunk(2, dim=-1)
    x, parts = decode.conv_project(state.conv, x, ssm.conv_weight, ssm.conv_bias, ssm.x_proj_weight)
    y = decode.dt_scan(state.scan, x, z, parts, ssm.dt_proj_weight, ssm.dt_bias, ssm.A_log, ssm.D)
    return decode.linear(y, mixer.out_proj.weight, ahead=ahead)[0]


def _mamba2(mixer: Mamba2Mixer, projected: Tensor, state: SSMState, ahead: Tensor | None) -> Tensor:
    ssm = mixer.ssm
    z, x, dt = ssm.parts(projected)
    y = decode.conv_ssd(state.scan, state.conv, x, dt, ssm.conv_weight, ssm.conv_bias, ssm.A_log, ssm.D, ssm.dt_bias)
    return decode.linear(
        *(y, mixer.out_proj.weight, ssm.norm_weight, ssm.norm_eps),
        z=z,
        groups=ssm.group_shape[0],
        conv_state=state.conv,
        conv_input=x,
        ahead=ahead,
    )[0]
