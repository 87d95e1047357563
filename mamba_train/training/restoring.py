"""Weights, moments and random states out of a checkpoint into an engine: at a resume, and when a run goes back."""

from collections.abc import Callable
from pathlib import Path

from mamba_train.checkpoint import resume_policy, rng, storage
from mamba_train.parallel.engine import Engine


def restore_tensors(checkpoint: Path, engine: Engine, log: Callable[[str], None]) -> None:
    """Fill what each rank holds; called by all ranks."""

    def load() -> None:
        resume_policy.check_shapes(storage.model_shapes(checkpoint), engine.parameter_shapes())
        storage.load_pieces(checkpoint, engine.pieces())
        for name in rng.restore(storage.load_rng(checkpoint, engine.rank)):
            log(f"the random state {name} of the checkpoint has no generator here and was left out")

    engine.ranks.together(load)
    engine.pieces_changed()
