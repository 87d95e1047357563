"""A folder of our weights that others can load."""

from pathlib import Path

from mamba_train.checkpoint.tensors import total_bytes
from mamba_train.config import ModelConfig
from mamba_train.convert import files
from mamba_train.convert.card import model_card
from mamba_train.convert.model_configs import has_grouped_norm, to_config_json
from mamba_train.convert.names import Layout, n_parameters, to_layout
from mamba_train.convert.source import Log, load_pretrained
from mamba_train.convert.verify import logits_of, probe, verify_export
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.model.language_model import padded_vocab_size

CARD = "README.md"
GROUPED_NORM = (
    "some releases of transformers take the gated norm over the full width instead of each group, "
    "and compute other logits; the installed one is checked now"
)


def export(source: str | Path, target: Path, layout: Layout, log: Log, tokenizer: Path | None = None) -> None:
    """Write the weights of `source` to the new folder `target`, and load them back before it gets its name.

    tokenizer: a tokenizer.json to send along instead of the run's own.
    Raises ValueError when `target` exists, when the layout has no place for the model, or when what was loaded back
    does not compute the same; then nothing is left at `target`.
    """
    pretrained = load_pretrained(source, log)
    serialised = pretrained.tokenizer if tokenizer is None else read_tokenizer(tokenizer)
    eos_id = None if serialised is None else check_tokenizer(serialised, pretrained.config).eos_id
    config_json = to_config_json(pretrained.config, layout, eos_id)
    if layout is Layout.transformers and has_grouped_norm(pretrained.config):
        log(f"warning: model.n_groups={pretrained.config.n_groups}: {GROUPED_NORM}")
    with files.new_folder(target, int(1.02 * total_bytes(pretrained.tensors)) + 2**20) as folder:
        weights = to_layout(pretrained.tensors, pretrained.config, layout)
        if layout is Layout.transformers:
            files.write_safetensors(folder / files.SAFETENSORS, weights)
        else:
            files.write_bin(folder / files.BIN, weights)
        files.write_json(folder / files.CONFIG_JSON, config_json)
        if serialised is None:
            log("no tokenizer goes along: the run's is not there any more; --tokenizer FILE gives one")
        else:
            _write_tokenizer(folder, serialised, layout)
        tokens = probe(pretrained.config)
        expected = logits_of(pretrained.config, pretrained.tensors, tokens)
        checked = verify_export(folder, layout, pretrained.tensors, tokens, expected)
        size = n_parameters(pretrained.config)
        card = model_card(pretrained.config, layout, size, pretrained.run_config, pretrained.step, checked)
        (folder / CARD).write_text(card, encoding="utf-8")
    log(f"{target}: {pretrained.config.name}, {size:,} parameters, layout {layout}; {checked}")


def read_tokenizer(path: Path) -> bytes:
    """The contents of a tokenizer.json of the user's; raises ValueError when it is not one."""
    if not path.is_file():
        raise ValueError(f"--tokenizer {path}: there is no such file; expected a tokenizer.json")
    serialised = path.read_bytes()
    TextTokenizer(serialised, f"--tokenizer {path}")
    return serialised


def check_tokenizer(serialised: bytes, config: ModelConfig) -> TextTokenizer:
    """The tokenizer, which must have no token that the model has no row for (ValueError)."""
    tokenizer = TextTokenizer(serialised, "the tokenizer")
    rows = padded_vocab_size(config)
    if tokenizer.vocab_size > rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {rows} rows")
    return tokenizer


def _write_tokenizer(folder: Path, serialised: bytes, layout: Layout) -> None:
    (folder / files.TOKENIZER).write_bytes(serialised)
    if layout is Layout.transformers:
        tokenizer = TextTokenizer(serialised, "the tokenizer")
        eos = tokenizer.decode([tokenizer.eos_id])
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), eos)
        files.write_json(folder / files.TOKENIZER_CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast", **names})
