"""`mamba-train convert export|import`: weights to and from the layouts of transformers and state-spaces."""

import argparse

from mamba_train.run_folder import user_path

LAYOUTS = ("transformers", "state-spaces")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="export|import")
    export = actions.add_parser(
        "export", help="write a folder that others can load", description="Write a folder that others can load."
    )
    export.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="folder of a run (its newest checkpoint) or of one")
    export.add_argument("target", type=user_path, metavar="OUT", help="the folder to make")
    export.add_argument("--layout", required=True, choices=LAYOUTS, help="who loads it")
    import_ = actions.add_parser(
        "import", help="make a run folder of published weights", description="Make a run folder of published weights."
    )
    import_.add_argument("source", metavar="PATH_OR_HUB_NAME", help="a folder, or a name like state-spaces/mamba-130m")
    import_.add_argument("target", type=user_path, metavar="OUT_RUN_DIR", help="the run folder to make")
    for action in (export, import_):
        action.add_argument("--tokenizer", type=user_path, metavar="FILE", help="a tokenizer.json to use instead")


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was made; raises ValueError, one line, for whatever cannot be converted."""
    if args.target.exists():  # said before the seconds that importing torch takes
        raise ValueError(f"{args.target} exists already; choose another place, nothing is overwritten")
    from mamba_train.convert.export import export
    from mamba_train.convert.import_run import import_run
    from mamba_train.convert.names import Layout

    if args.action == "export":
        export(args.source, args.target, Layout(args.layout), _say, args.tokenizer)
    else:
        import_run(args.source, args.target, _say, args.tokenizer)


def _say(line: str) -> None:
    print(line, flush=True)
