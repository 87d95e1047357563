"""Train a Mamba language model: `python train.py [GROUP=OPTION ...] [KEY=VALUE ...]`, see `--help`."""

from mamba_train import composition
from mamba_train.config import Config


def run(config: Config) -> None:
    """Build the trainer and run it; torch is imported only here, after the config has been checked."""
    with composition.user_errors_exit():
        from mamba_train.training.build import build_trainer

        trainer = build_trainer(config)
    trainer.run()


if __name__ == "__main__":
    composition.main(run)
