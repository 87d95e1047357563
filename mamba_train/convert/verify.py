"""Load an export as its users will, and compare what it computes with what the run computes."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamba_train.config import ModelConfig
from mamba_train.convert.names import Layout
from mamba_train.convert.source import load_pretrained
from mamba_train.model.language_model import MambaLM

MAX_RELATIVE_DIFFERENCE = 1e-4
PROBE_SHAPE = (2, 48)


def logits_of(config: ModelConfig, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Our logits of tokens (batch, length): fp32 (batch, length, padded vocabulary)."""
    with torch.device("meta"):
        model = MambaLM(config)
    model.load_state_dict(dict(tensors), assign=True)
    model.requires_grad_(False).eval()
    return model(tokens)


def verify_export(folder: Path, layout: Layout, tensors: Mapping[str, Tensor], tokens: Tensor, expected: Tensor) -> str:
    """Load `folder` and return one line that says by what it was loaded and how near its logits are.

    The weights must come back bit by bit through our importer, and the logits within 1e-4 of `expected`, which are
    ours of `tokens`, relative to the largest. They are those of transformers where that is the layout and it is
    installed.
    Raises ValueError when one of them does not.
    """
    silent = _no_log
    again = load_pretrained(folder, silent)
    for name, tensor in tensors.items():
        if not torch.equal(again.tensors[name], tensor):
            raise ValueError(f"the export came back with other bits in {name}; nothing was written")
    if layout is Layout.transformers and importlib.util.find_spec("transformers"):
        loaded_by, actual = "transformers", _logits_of_transformers(folder, tokens)
    else:
        loaded_by, actual = "our importer", logits_of(again.config, again.tensors, tokens)
    difference = float((actual - expected).abs().max() / expected.abs().max())
    if not difference <= MAX_RELATIVE_DIFFERENCE:
        raise ValueError(
            f"the export, loaded by {loaded_by}, computes other logits than the run: relative difference "
            f"{difference:.1e}, at most {MAX_RELATIVE_DIFFERENCE:.0e} expected; nothing was written"
        )
    return f"loaded back by {loaded_by}: weights bit-equal, logits within {difference:.1e} relative"


def _logits_of_transformers(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    model, report = loaded
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            raise ValueError(f"transformers reports {len(names)} {kind} in the export, first {names[0]}")
    with torch.no_grad():
        return model.eval()(tokens).logits.float()


def probe(config: ModelConfig) -> Tensor:
    """Token ids (batch, length), the same each time."""
    assert config.vocab_size is not None
    return torch.randint(0, config.vocab_size, PROBE_SHAPE, generator=torch.Generator().manual_seed(0))


def _no_log(line: str) -> None:
    pass
