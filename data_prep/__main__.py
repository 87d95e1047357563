"""`python -m data_prep COMMAND`: train a tokenizer, tokenise to shards, verify, inspect, stats."""

import argparse
import errno
import importlib

# Each is a module of data_prep with `add_arguments(parser)` and `run(arguments)`.
COMMANDS = {
    "train-tokenizer": "train a byte-level BPE on a sample of the text",
    "tokenize": "turn text into token shards, in parallel, resumably",
    "verify": "read every byte of the shards and say what is wrong",
    "inspect": "show documents of the shards as text",
    "stats": "count tokens and document lengths per domain, as a table and a PNG",
}


def main() -> None:
    """Parse the command line and run one command; a user's mistake is one line and exit code 2."""
    # Here, because every worker process imports this module again and needs no Hydra.
    from mamba_train.composition import user_errors_exit

    parser = argparse.ArgumentParser(prog="python -m data_prep", description="From raw text to verified token shards.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"data_prep.{name.replace('-', '_')}")
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    arguments = parser.parse_args()
    with user_errors_exit():
        try:
            arguments.run(arguments)
        except OSError as error:
            output = getattr(
                arguments, "output", None
            )  # not all write files; what they print may go to a full disk, too
            if output is not None and error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:
                raise ValueError(f"--output {output}: cannot be written ({error.strerror})") from error
            raise
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on where it stopped") from None


if __name__ == "__main__":
    main()
