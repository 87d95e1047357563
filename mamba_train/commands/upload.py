"""`mamba-train upload RUN [RUN...]`: send what runs recorded offline to Weights & Biases."""

import argparse
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from mamba_train.config import LoggingConfig
from mamba_train.run_folder import CONFIG, read_config, user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="folder of a run (its run_dir)")


def run(args: argparse.Namespace) -> None:
    """Upload each run, under the id that its checkpoints name; what wandb has already is not sent again.

    Raises ValueError, with one line for the user, when that is not possible.
    """
    from mamba_train.monitor.wandb_sink import upload  # --help need not wait for it

    for run_dir in args.runs:
        run_id = wandb_run_id(run_dir)
        config = read_config(run_dir / CONFIG, "logging")
        logging = cast(LoggingConfig, OmegaConf.merge(LoggingConfig, config.logging))
        shown = cast(dict[str, Any], OmegaConf.to_container(config))
        n_records, address = upload(run_dir, logging, shown, run_id)
        print(f"{run_dir}: {n_records:,} steps uploaded to {address}")


def wandb_run_id(run_dir: Path) -> str:
    """The id of the run at wandb, from its newest checkpoint; raises ValueError where there is none."""
    from mamba_train.checkpoint.layout import checkpoints_dir, step_name
    from mamba_train.checkpoint.storage import complete_steps, read_record

    folder = checkpoints_dir(run_dir)
    steps = complete_steps(folder)
    if not steps or not (run_dir / CONFIG).is_file():
        raise ValueError(f"{run_dir}: expected the folder of a run with a complete checkpoint, which has the wandb id")
    train = read_record(folder / step_name(steps[0])).state.get("train", {})
    if not train.get("wandb_run_id"):
        raise ValueError(f"{run_dir}: it was trained with logging.wandb=disabled and has no wandb id")
    return str(train["wandb_run_id"])
