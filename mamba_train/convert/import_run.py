"""A run folder of published weights: `generate`, `export` and `init_from` take it like one that was trained here."""

import dataclasses
from pathlib import Path

from mamba_train import run_folder
from mamba_train.checkpoint.layout import CHECKPOINTS
from mamba_train.checkpoint.storage import Checkpoint, save
from mamba_train.checkpoint.tensors import total_bytes
from mamba_train.convert import files
from mamba_train.convert.export import check_tokenizer, read_tokenizer
from mamba_train.convert.names import n_parameters
from mamba_train.convert.source import Log, load_pretrained


def import_run(source: str | Path, run_dir: Path, log: Log, tokenizer: Path | None = None) -> None:
    """Make `run_dir` with one checkpoint, of step 0, that holds the weights of `source` and no optimiser.

    tokenizer: a tokenizer.json for weights that come without one.
    Raises ValueError when `run_dir` exists, or when `source` is nothing that our model could compute.
    """
    pretrained = load_pretrained(source, log)
    serialised = pretrained.tokenizer if tokenizer is None else read_tokenizer(tokenizer)
    if serialised is not None:
        check_tokenizer(serialised, pretrained.config)
    size = n_parameters(pretrained.config)
    with files.new_folder(run_dir, int(1.02 * total_bytes(pretrained.tensors)) + 2**20) as folder:
        checkpoint = Checkpoint(
            step=0,
            model=pretrained.tensors,
            state={"imported_from": pretrained.origin},
            config={"model": dataclasses.asdict(pretrained.config)},
        )
        save(folder / CHECKPOINTS, checkpoint, reserve_gib=0)
        run_folder.write_summary(folder, n_parameters=size, data_folder=run_dir)
        if serialised is None:
            log(f"{source} has no {run_folder.TOKENIZER}, and `generate` needs one: --tokenizer FILE gives one")
        else:
            (folder / run_folder.TOKENIZER).write_bytes(serialised)
    log(f"{run_dir}: {pretrained.config.name}, {size:,} parameters, as the checkpoint of step 0")
