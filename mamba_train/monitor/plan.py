"""What a run will need, worked out from its config alone: no data, no GPU, no step.

The parameters are those of the model itself, built on the meta device, where a tensor has a shape and no memory. What a
device must hold depends on the engine: `mamba_train.parallel.memory`.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from mamba_train.config import Config, ModelConfig
from mamba_train.model.language_model import MambaLM, resolve_model_config
from mamba_train.monitor.flops import FlopsPerToken, flops_per_token

CHECKPOINT_BYTES = 3 * 4  # weights and both moments, fp32


@dataclass(frozen=True)
class Plan:
    """The figures of one run.

    parameters: by component, summed over the layers.
    kept_checkpoints: the most there are at once, the one being written included.
    """

    model: ModelConfig
    parameters: dict[str, int]
    flops: FlopsPerToken
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
    permanent = checkpoint.permanent_interval_steps
    kept = checkpoint.keep_last + int(checkpoint.keep_best) + 1
    return Plan(
        model=model,
        parameters=parameters,
        flops=flops_per_token(model, config.data.sequence_length),
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
