"""`init_from`: begin with weights that exist instead of drawn ones (annealing, fine-tuning, continued pretraining).

Only the weights are taken. Optimiser, schedule, data position and random states begin anew, as in any fresh run.
"""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from mamba_train.config import MixerKind, ModelConfig, layer_mixers
from mamba_train.convert.names import check_shapes
from mamba_train.convert.source import Pretrained, load_pretrained, locate
from mamba_train.data.manifest import TOKENIZER_NAME
from mamba_train.parallel.engine import Engine
from mamba_train.parallel.state import load_weights

# The keys of `model` that decide what is computed; the others decide how weights are drawn or how fast it goes.
_OF_EVERY_MODEL = ("n_layer", "d_model", "d_intermediate", "tie_embeddings", "norm_eps")
_OF_A_MIXER = {
    MixerKind.mamba1: ("d_state", "d_conv", "expand", "dt_rank", "time_invariant"),
    MixerKind.mamba2: ("d_state", "d_conv", "expand", "head_dim", "n_groups"),
    MixerKind.attention: (
        "attention_heads",
        "attention_kv_heads",
        "attention_head_dim",
        "attention_d_conv",
        "rotary_dim",
    ),
}


def find_initial_weights(source: str, log: Callable[[str], None]) -> None:
    """Raise ValueError when there are no weights at `source`; fetch them when they are on the Hub."""
    try:
        locate(source, log)
    except ValueError as error:
        raise ValueError(f"init_from={error}") from error


def load_initial_weights(
    source: str, engine: Engine, config: ModelConfig, data_folder: Path, log: Callable[[str], None]
) -> None:
    """Put the weights of `source` into the engine's model, which `config` (resolved) describes.

    Raises ValueError, one line, when they are of another architecture, another shape or another tokenizer.
    """
    try:
        pretrained = load_pretrained(source, log)
    except ValueError as error:
        raise ValueError(f"init_from={source}: {error}") from error
    _check_architecture(pretrained, config, source)
    shapes = {name: tuple(tensor.shape) for name, tensor in pretrained.tensors.items()}
    remedy = "; set model.* (and data.tokenizer, for the vocabulary) to what the weights have"
    check_shapes(shapes, engine.parameter_shapes(), f"init_from={source}", remedy)
    _check_tokenizer(pretrained, data_folder / TOKENIZER_NAME, source, log)
    load_weights(engine, pretrained.tensors)
    step = "" if pretrained.step is None else f", after step {pretrained.step} of its run"
    log(f"the initial weights are those of {source}{step}; optimiser and schedule begin anew")


def _check_architecture(pretrained: Pretrained, config: ModelConfig, source: str) -> None:
    theirs = pretrained.config
    keys = [*_OF_EVERY_MODEL, *(key for mixer in sorted(set(layer_mixers(theirs))) for key in _OF_A_MIXER[mixer])]
    other = [key for key in dict.fromkeys(keys) if getattr(theirs, key) != getattr(config, key)]
    if not other and layer_mixers(theirs) != layer_mixers(config):
        other = ["mixer" if theirs.mixer is not config.mixer else "attention_layers"]
    if other:
        first = other[0]
        raise ValueError(
            f"init_from={source}: the weights are of another model: model.{first} is {getattr(theirs, first)} there "
            f"and {getattr(config, first)} here (keys that differ: {', '.join(other)})"
        )


def _check_tokenizer(pretrained: Pretrained, path: Path, source: str, log: Callable[[str], None]) -> None:
    """The same id must mean the same token, or the embedding would be one of other words."""
    if pretrained.tokenizer is None:
        log(f"warning: {source} has no tokenizer; the data must be tokenised with the one it was trained with")
        return
    theirs = Tokenizer.from_buffer(pretrained.tokenizer).get_vocab(with_added_tokens=True)
    ours = Tokenizer.from_buffer(path.read_bytes()).get_vocab(with_added_tokens=True)
    names = {number: token for token, number in theirs.items()}
    other = [token for token, number in ours.items() if names.get(number, token) != token]
    if other:
        raise ValueError(
            f"init_from={source}: the weights were trained with another tokenizer ({len(other):,} of {len(ours):,} "
            "tokens have other ids here); set data.tokenizer to the tokenizer.json of the weights"
        )
