"""`mamba-train lm-eval ARGUMENTS`: the command line of lm-evaluation-harness, knowing `--model mamba_train`."""

import sys


def main(arguments: list[str]) -> None:
    """Run the harness; raises ValueError when it is not installed."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise ValueError("lm-eval: the package lm_eval is not installed (pip install -e '.[lm-eval]')") from None
    import lm_eval.models  # noqa: F401  # the models of the harness itself, which it looks for only while it knows none

    import mamba_train.evaluation.harness  # noqa: F401  # makes itself known

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
