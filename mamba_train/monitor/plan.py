"""What a run will need, worked out from its config alone: no data, no GPU, no step.

The parameters are those of the model itself, built on the meta device, where a tensor has a shape and no memory.
Memory is that of the one-device engine; the activations are an estimate by the formula of `activation_bytes_per_token`.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch

from kernels.selective_scan.plan import GPU_CHUNK
from mamba_train.config import Config, MixerKind, ModelConfig, Precision, layer_mixers
from mamba_train.model.contract import rule_for
from mamba_train.model.language_model import MambaLM, padded_vocab_size, resolve_model_config
from mamba_train.monitor.flops import FlopsPerToken, flops_per_token

MASTER_BYTES = 4  # fp32: weights, gradients, and each of AdamW's two moments
CHECKPOINT_BYTES = 3 * MASTER_BYTES  # weights and both moments
LOGITS_CHUNK = 2**26  # logits that linear_cross_entropy holds at once on a GPU


@dataclass(frozen=True)
class Plan:
    """The figures of one run.

    parameters: by component, summed over the layers. memory_bytes: by component, on one device.
    kept_checkpoints: the most there are at once, the one being written included.
    """

    model: ModelConfig
    parameters: dict[str, int]
    flops: FlopsPerToken
    memory_bytes: dict[str, int]
    activation_bytes_per_token: int
    checkpoint_bytes: int
    kept_checkpoints: int
    total_steps: int
    tokens_per_step: int

    @property
    def n_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.tokens_per_step

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole run, forward and backward, nothing computed twice."""
        return float(self.flops.training) * self.total_tokens

    def device_hours(self, peak_flops_per_second: float, mfu: float) -> float:
        """Hours of one device at a share `mfu` of its peak."""
        return self.training_flops / (peak_flops_per_second * mfu) / 3600


def make_plan(config: Config, tokenizer_vocab_size: int) -> Plan:
    """Work out what `config` needs; raises ValueError when the vocabulary does not fit the model's."""
    model = resolve_model_config(config.model, tokenizer_vocab_size)
    training, checkpoint = config.training, config.checkpoint
    with torch.device("meta"):
        built = MambaLM(model)
    shapes = {name: parameter.numel() for name, parameter in built.named_parameters()}
    parameters = count_by_component(shapes)
    n_parameters = sum(parameters.values())
    value_bytes = 4 if config.engine.precision is Precision.fp32 else 2
    per_token = activation_bytes_per_token(model, value_bytes)
    micro_batch_tokens = training.micro_batch_size * config.data.sequence_length
    head = padded_vocab_size(model) * model.d_model
    memory = {
        "weights (fp32 masters)": MASTER_BYTES * n_parameters,
        "gradients (fp32)": MASTER_BYTES * n_parameters,
        "AdamW moments (2 x fp32)": 2 * MASTER_BYTES * n_parameters,
        "copies of the matrices in bf16": 0 if value_bytes == 4 else value_bytes * _cast(shapes),
        "activations (estimate)": per_token * micro_batch_tokens,
        "logits chunk and gradient of the head": (4 + value_bytes) * _logits(model, micro_batch_tokens) + 4 * head,
    }
    permanent = checkpoint.permanent_interval_steps
    kept = checkpoint.keep_last + int(checkpoint.keep_best) + 1
    return Plan(
        model=model,
        parameters=parameters,
        flops=flops_per_token(model, config.data.sequence_length),
        memory_bytes={name: size for name, size in memory.items() if size},
        activation_bytes_per_token=per_token,
        checkpoint_bytes=CHECKPOINT_BYTES * n_parameters,
        kept_checkpoints=kept + (training.total_steps // permanent if permanent else 0),
        total_steps=training.total_steps,
        tokens_per_step=training.global_batch_size * config.data.sequence_length,
    )


def count_by_component(sizes: dict[str, int]) -> dict[str, int]:
    """Sum parameter counts over the layers: `layers.7.mixer.in_proj.weight` counts as `mixer.in_proj.weight`."""
    counts: Counter[str] = Counter()
    for name, size in sizes.items():
        counts[name.split(".", 2)[2] if name.startswith("layers.") else name] += size
    return dict(counts)


def activation_bytes_per_token(model: ModelConfig, value_bytes: int) -> int:
    """Bytes that the backward pass needs of each token, without recomputation.

    Per layer, with d = d_model, e = d_inner, n = d_state, r = dt_rank, h heads of Mamba-2, g groups,
    f = d_intermediate, q = width of queries, k = width of keys, and values of `value_bytes`: the residual in fp32
    (4 d), the normed input (d), and of the mixer
        Mamba-1    6 e + r + 2 n (x, z, the convolution's output, Δ, y before and after the gate)
        Mamba-2    5 e + 4 g n + h (z, x B C before and after the convolution, y before and after the gated norm)
        attention  3 q + 4 k (queries, keys, values; queries and keys rotated; the output)
    besides the fp32 states the scan goes back to, one every 16 tokens (Mamba-1) or chunk_size (Mamba-2). An MLP adds
    a residual and a norm of its own and 4 f. After the layers: the last residual, the normed hidden state and its
    gradient.
    """
    d, e, n = model.d_model, model.expand * model.d_model, model.d_state
    assert model.dt_rank is not None
    head_width = model.attention_head_dim or (d // model.attention_heads if model.attention_heads else 0)
    q = (model.attention_heads or 0) * head_width
    k = (model.attention_kv_heads or model.attention_heads or 0) * head_width
    of_mixer = {
        MixerKind.mamba1: value_bytes * (6 * e + model.dt_rank + 2 * n) + 4 * e * n // GPU_CHUNK,
        MixerKind.mamba2: value_bytes * (5 * e + 4 * model.n_groups * n + e // model.head_dim)
        + 4 * e * n // model.chunk_size,
        MixerKind.attention: value_bytes * (3 * q + 4 * k),
    }
    norm = (4 + value_bytes) * d
    mlp = norm + value_bytes * 4 * model.d_intermediate if model.d_intermediate else 0
    layers = sum(norm + of_mixer[mixer] + mlp for mixer in layer_mixers(model))
    return layers + norm + value_bytes * d


def _cast(sizes: dict[str, int]) -> int:
    """Parameters that autocast computes with in bf16."""
    return sum(size for name, size in sizes.items() if not rule_for(name).fp32_forward)


def _logits(model: ModelConfig, n_tokens: int) -> int:
    """Logits that exist at once."""
    rows = padded_vocab_size(model)
    return rows * min(n_tokens, math.ceil(LOGITS_CHUNK / rows))
