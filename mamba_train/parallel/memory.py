"""What a device will hold under each engine, worked out from the config alone: for `plan` and for `engine=auto`.

The parameters are those of the model itself, built on the meta device, where a tensor has a shape and no memory.
Masters, gradients and AdamW's two moments are fp32 everywhere; the engines differ in what of them a rank has, and in
what they gather for a while. The activations are an estimate by the formula of `activation_bytes_per_token`.
"""

import dataclasses
import math
from collections.abc import Iterable

import torch

from kernels.linear_cross_entropy.fused import GRADIENT_CHUNKS
from kernels.linear_cross_entropy.reference import GPU_LOGITS
from kernels.selective_scan.plan import GPU_CHUNK
from kernels.ssd.launch import GRADIENTS as SSD_GRADIENTS
from mamba_train.config import (
    Config,
    EngineConfig,
    EngineKind,
    MixerKind,
    ModelConfig,
    Precision,
    Recompute,
    layer_mixers,
)
from mamba_train.model.contract import rule_for
from mamba_train.model.language_model import MambaLM, padded_vocab_size
from mamba_train.parallel.sharded import layers_per_unit, shards
from mamba_train.parallel.zero import LIVE_ELEMENTS, PREFETCHED_ELEMENTS, REDUCED_ELEMENTS

MASTER_BYTES = 4  # fp32: weights, gradients, and each of AdamW's two moments
GIB = 2**30
# The CUDA context, NCCL's buffers, and what the allocator cannot use.
OVERHEAD_BYTES = 3 * GIB
GRADIENTS, SHARDED_GRADIENTS = "gradients (fp32)", "gradients (fp32, sharded)"
FLAT_GRADIENT = "flat gradient of the update"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of parameters. cast: of all those that autocast computes with in the dtype of the matrix products.

    root: embedding, last norm and head. layer: the largest layer; layer_fp32: what of it is gathered in fp32 by FSDP2.
    """

    total: int
    cast: int
    root: int
    layer: int
    layer_fp32: int


def memory_per_device(config: Config, model: ModelConfig, world_size: int) -> dict[str, int]:
    """Bytes by component on one device at the worst moment of a step; `model` is the resolved config of the model."""
    engine, training = config.engine, config.training
    sizes = count(model)
    value_bytes = 4 if engine.precision is Precision.fp32 else 2
    micro_batch_tokens = training.micro_batch_size * config.data.sequence_length
    n_micro_batches = max(1, training.global_batch_size // (training.micro_batch_size * world_size))
    if engine.name is EngineKind.fsdp:
        memory = _fsdp(sizes, engine, world_size, value_bytes, n_micro_batches)
    elif engine.name is EngineKind.deepspeed:
        memory = _zero(sizes, engine.zero_stage, world_size, value_bytes)
    else:
        memory = {
            "weights (fp32 masters)": MASTER_BYTES * sizes.total,
            GRADIENTS: MASTER_BYTES * sizes.total,
            "AdamW moments (2 x fp32)": 2 * MASTER_BYTES * sizes.total,
            "copies of the matrices in bf16": 0 if value_bytes == 4 else value_bytes * sizes.cast,
        }
    head = padded_vocab_size(model) * model.d_model
    activations = activation_bytes(model, value_bytes, engine.recompute, micro_batch_tokens, engine.recompute_layers)
    made = sum(memory.get(row, 0.0) for row in _made_at_the_end(engine, n_micro_batches))
    # What is made while or after the backward pass frees the activations takes their place: the larger counts.
    memory["activations (estimate)" + (", beyond gradients" if made else "")] = max(
        activations / model.n_layer, activations - made
    )
    logits = 4 * _logits(model, micro_batch_tokens)
    if value_bytes < 4:  # otherwise their gradients take their place
        logits += value_bytes * _logits(model, micro_batch_tokens, GRADIENT_CHUNKS)
    memory["logits chunk and gradient of the head"] = logits + 4 * head
    return {name: round(size) for name, size in memory.items() if size}


def _made_at_the_end(engine: EngineConfig, n_micro_batches: int) -> list[str]:
    """Rows that do not exist yet when the last backward pass of a step begins, and the activations are all there."""
    if engine.name is EngineKind.ddp or (engine.name is EngineKind.deepspeed and engine.zero_stage == 3):
        return []  # their buffers of gradients are there all the time
    made = [FLAT_GRADIENT]
    if n_micro_batches == 1:
        made += [GRADIENTS, SHARDED_GRADIENTS]
    return made


def _fsdp(
    sizes: Sizes, engine: EngineConfig, world_size: int, value_bytes: int, n_micro_batches: int
) -> dict[str, float]:
    n_shards = shards(engine, world_size)
    n_layers = (sizes.total - sizes.root) / sizes.layer
    in_unit = layers_per_unit(engine, round(n_layers), sizes.layer)
    unit_bytes = in_unit * (value_bytes * (sizes.layer - sizes.layer_fp32) + 4 * sizes.layer_fp32)
    # The unit at work, the next one on its way, and the buffer that it arrives in; or all of them.
    n_gathered = 3.0 if engine.reshard_after_forward is not False else 1 + n_layers / in_unit
    memory = {
        "weights (fp32 masters, sharded)": MASTER_BYTES * sizes.total / n_shards,
        SHARDED_GRADIENTS: MASTER_BYTES * sizes.total / n_shards,
        "AdamW moments (2 x fp32, sharded)": 2 * MASTER_BYTES * sizes.total / n_shards,
        "gathered weights": 4 * sizes.root + n_gathered * unit_bytes,
        "gradients being summed over the ranks": 8.0 * max(sizes.root, in_unit * sizes.layer),
    }
    if n_micro_batches > 1 and not (engine.reduce_each_micro_batch or engine.cuda_graphs):
        # The part of this rank takes their place, layer by layer.
        memory[SHARDED_GRADIENTS] = 0.0
        memory["whole gradients of accumulation (fp32)"] = float(MASTER_BYTES * sizes.total)
    return memory


def _zero(sizes: Sizes, stage: int, world_size: int, value_bytes: int) -> dict[str, float]:
    part = MASTER_BYTES * sizes.total / world_size
    reduced = float(MASTER_BYTES * min(REDUCED_ELEMENTS, sizes.total))
    memory = {
        "weights (fp32)": MASTER_BYTES * sizes.total if stage < 3 else part,
        GRADIENTS: MASTER_BYTES * sizes.total if stage == 1 else part,
        "AdamW moments (2 x fp32, sharded)": 2 * part,
        "gradients being summed over the ranks": 2 * reduced,
    }
    if stage < 3:
        memory["fp32 copy of the part"] = part
        memory[FLAT_GRADIENT] = part
        memory["copies of the matrices in bf16"] = 0 if value_bytes == 4 else value_bytes * sizes.cast
    else:
        live = min(LIVE_ELEMENTS + PREFETCHED_ELEMENTS, sizes.total) + sizes.root
        memory["gathered weights (fp32)"] = float(MASTER_BYTES * live)
        memory["fp32 copy of the part"] = part
    return memory


def count(model: ModelConfig) -> Sizes:
    """Sizes of the model that a resolved config describes."""
    with torch.device("meta"):
        built = MambaLM(model)
    layers: dict[str, int] = {}
    fp32_of_layers: dict[str, int] = {}
    total = cast = root = 0
    for name, parameter in built.named_parameters():
        n = parameter.numel()
        total += n
        cast += 0 if rule_for(name).fp32_forward else n
        if not name.startswith("layers."):
            root += n
            continue
        layer = name.split(".")[1]
        layers[layer] = layers.get(layer, 0) + n
        if ".ssm." in name or name.endswith("norm.weight"):
            fp32_of_layers[layer] = fp32_of_layers.get(layer, 0) + n
    largest = max(layers, key=lambda layer: layers[layer])
    return Sizes(total, cast, root, layers[largest], fp32_of_layers.get(largest, 0))


def activation_bytes(
    model: ModelConfig, value_bytes: int, recompute: Recompute, n_tokens: int, layers: int | None = None
) -> int:
    """Of one micro-batch: what the backward pass finds of the forward pass, and what it computes again at once.

    layers: as `engine.recompute_layers`.
    """
    d, e, n = model.d_model, model.expand * model.d_model, model.d_state
    kept = activation_bytes_per_token(model, value_bytes)
    # The backward of SSD computes the gradients of the states before all chunks: those of one layer.
    carried = value_bytes * e * n // SSD_GRADIENTS.chunk if MixerKind.mamba2 in layer_mixers(model) else 0
    whole = kept + carried
    if recompute is Recompute.none:
        return whole * n_tokens
    states = 4 * e * n // GPU_CHUNK if model.mixer is MixerKind.mamba1 else 0
    if recompute in (Recompute.scan, Recompute.auto):
        # Mamba-1: Δ, y before and after the gate, and the states; Mamba-2: decays and states. The backward pass has
        # those of one layer.
        mixers = layer_mixers(model)[:layers]
        again = {MixerKind.mamba1: 3 * value_bytes * e + states, MixerKind.mamba2: _ssd_keeps(model, value_bytes)}
        less = sum(max(0, mixers.count(kind) - 1) * n_bytes for kind, n_bytes in again.items())
        return (whole - less) * n_tokens
    inputs = (4 + value_bytes) * d * model.n_layer  # hidden and residual of each layer
    if recompute is Recompute.keep_scan:
        n_ssm = sum(mixer is not MixerKind.attention for mixer in layer_mixers(model))
        inputs += n_ssm * (2 * value_bytes * e + states)
        inputs += layer_mixers(model).count(MixerKind.mamba2) * _ssd_keeps(model, value_bytes)
    return (inputs + kept // model.n_layer + carried) * n_tokens


def activation_bytes_per_token(model: ModelConfig, value_bytes: int) -> int:
    """Bytes that the backward pass needs of each token, without recomputation.

    Per layer, with d = d_model, e = d_inner, n = d_state, r = dt_rank, h heads of Mamba-2, g groups,
    f = d_intermediate, q = width of queries, k = width of keys, and values of `value_bytes`: the residual in fp32
    (4 d), the normed input (d), and of the mixer
        Mamba-1    6 e + r + 2 n (x, z, the convolution's output, Δ, y before and after the gate)
        Mamba-2    5 e + 4 g n + h (z, x B C before and after the convolution, y before and after the gated norm), the
                   states before chunks, e n / 64, and Δ and decays of the heads, 4 h in fp32
        attention  3 q + 4 k (queries, keys, values; queries and keys rotated; the output)
    besides the fp32 states that the scan of Mamba-1 goes back to, one every 16 tokens. An MLP adds
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
        + _ssd_keeps(model, value_bytes),
        MixerKind.attention: value_bytes * (3 * q + 4 * k),
    }
    norm = (4 + value_bytes) * d
    mlp = norm + value_bytes * 4 * model.d_intermediate if model.d_intermediate else 0
    layers = sum(norm + of_mixer[mixer] + mlp for mixer in layer_mixers(model))
    return layers + norm + value_bytes * d


def _ssd_keeps(model: ModelConfig, value_bytes: int) -> int:
    """Bytes of a token that the SSD of a layer keeps besides its arguments."""
    e = model.expand * model.d_model
    return value_bytes * e * model.d_state // SSD_GRADIENTS.chunk + 4 * 4 * e // model.head_dim


def _logits(model: ModelConfig, n_tokens: int, chunks: int = 1) -> int:
    """Logits of so many chunks of tokens, or of all."""
    rows = padded_vocab_size(model)
    return rows * min(n_tokens, chunks * math.ceil(GPU_LOGITS / rows))


def fits(config: Config, model: ModelConfig, world_size: int, device_bytes: float) -> bool:
    """Whether a step needs no more than a device has."""
    return sum(memory_per_device(config, model, world_size).values()) + OVERHEAD_BYTES <= device_bytes


def remedy(config: Config, model: ModelConfig, world_size: int, device_bytes: float) -> str | None:
    """The overrides, as few as possible, that make a run fit on the same number of devices; None: there are none."""
    for changes in _changes(config, model, world_size):
        if fits(_changed(config, changes), model, world_size, device_bytes):
            return " ".join(f"{key}={'null' if value is None else value}" for key, value in changes.items())
    return None


def _changes(config: Config, model: ModelConfig, world_size: int) -> Iterable[dict[str, object]]:
    """From the least to the most that is given up."""
    layers = config.engine.recompute_layers
    in_all: dict[str, object] = {} if layers is None or layers >= model.n_layer else {"engine.recompute_layers": None}
    policies = [
        {"engine.recompute": policy, **in_all} for policy in (Recompute.scan, Recompute.keep_scan, Recompute.layer)
    ]
    engines: list[dict[str, object]] = [{}]
    if world_size > 1 and config.engine.name is not EngineKind.fsdp:
        engines.append({"engine.name": EngineKind.fsdp})
    single_rows: dict[str, object] = {"training.micro_batch_size": 1}
    for engine in engines:
        yield engine
        for recompute in policies:
            yield {**engine, **recompute}
        yield {**engine, **single_rows}
        for recompute in policies:
            yield {**engine, **single_rows, **recompute}
    if world_size > 1:
        yield {**engines[-1], **policies[-1], **single_rows, "engine.reduce_each_micro_batch": True}


def _changed(config: Config, changes: dict[str, object]) -> Config:
    for key, value in changes.items():
        section, name = key.split(".")
        part = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: part})
    return config
