"""`mamba-train COMMAND`, or `python -m mamba_train COMMAND`."""

import argparse
import importlib
import sys

from mamba_train.composition import user_errors_exit

# Each is a module of mamba_train.commands with `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "convert": "weights to and from the layouts of transformers and state-spaces",
    "doctor": "say whether a run would start on this machine",
    "evaluate": "score a model: nats and bits per byte, by domain or by length",
    "generate": "write text with a trained model",
    "plan": "say what a run needs: parameters, FLOPs, memory, disk, time",
    "report": "draw the curves of one or several runs",
    "upload": "send what runs recorded offline to Weights & Biases",
}
HARNESS = "lm-eval"


def main() -> None:
    """Parse the command line and run one command; a user's mistake is one line and exit code 2."""
    if sys.argv[1:2] == [HARNESS]:  # what follows is for the harness to read
        with user_errors_exit():
            importlib.import_module("mamba_train.commands.lm_eval").main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="mamba-train", description="Work with what train.py has made.")
    parser.epilog = f"mamba-train {HARNESS} ...: lm-evaluation-harness with `--model mamba_train`; see its own --help"
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"mamba_train.commands.{name}")
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments, rest = parser.parse_known_args()
    if any(word.startswith("-") for word in rest) or (rest and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # overrides that followed an option: argparse stops looking for them there
        arguments.overrides += rest
    with user_errors_exit():
        arguments.run(arguments)


if __name__ == "__main__":
    main()
