"""Train a Mamba language model: `python train.py [GROUP=OPTION ...] [KEY=VALUE ...]`, see `--help`."""

import functools
import os
import signal
import sys

from mamba_train import composition
from mamba_train.config import Config
from mamba_train.training.preemption import EXIT_RESTART, Stopped, StopRequest


def run(config: Config, stop: StopRequest) -> None:
    """Build the trainer and run it; torch is imported only here, after the config has been checked."""
    with composition.user_errors_exit():
        from mamba_train import ranks
        from mamba_train.checkpoint import NotEnoughDiskSpace
        from mamba_train.data.corpus import ReadError
        from mamba_train.training.build import build_trainer
        from mamba_train.training.hooks.recording import CannotRecord
        from mamba_train.training.hooks.rollback import GaveUp

        trainer = build_trainer(config, stop)

    def interrupt(signal_number: int, frame: object) -> None:
        trainer.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if trainer.engine.rank == 0:  # a step may wait long for its data; not print, which this may have interrupted
            os.write(2, b"Ctrl-C: leaving at the end of this step; a second one does not wait for it\n")

    signal.signal(signal.SIGINT, interrupt)
    try:
        trainer.run()
    except ReadError as error:  # of this rank, while the others are in a step
        composition.exit_with_error(error, code=1, alone=True)
    except (NotEnoughDiskSpace, CannotRecord, GaveUp, ranks.OtherRankFailed) as error:
        composition.exit_with_error(error, code=1)
    except Stopped as stopped:
        print(f"{stopped}: the same command goes on from there", file=sys.stderr)
        ranks.leave(EXIT_RESTART)
        sys.exit(EXIT_RESTART)
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from the newest checkpoint")
    if trainer.data_ended and trainer.engine.rank == 0:
        print(f"the text ended after step {trainer.state.step} (data.repeat=false)", file=sys.stderr)
    ranks.leave()


if __name__ == "__main__":
    stop_request = StopRequest()
    stop_request.listen()
    composition.main(functools.partial(run, stop=stop_request))
