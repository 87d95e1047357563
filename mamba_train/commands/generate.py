"""`mamba-train generate RUN`: text from the newest checkpoint of a run."""

import argparse
import math
import sys
from pathlib import Path

from mamba_train.run_folder import SAMPLE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of a run (its run_dir)")
    parser.add_argument("--prompt", default="", help="text to continue (default: begin a document)")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the tokens with this much probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--save", action="store_true", help=f"also write the text to RUN/{SAMPLE}")


def run(args: argparse.Namespace) -> None:
    """Write the prompt and its continuation to stdout as it grows; raises ValueError for bad arguments."""
    _check(args)
    import torch

    from mamba_train.inference.generate import generate
    from mamba_train.inference.load import load_model, load_run_tokenizer

    tokenizer = load_run_tokenizer(args.run_dir)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    model, step = load_model(args.run_dir, torch.device(args.device), lambda line: print(line, file=sys.stderr))
    prompt = [tokenizer.eos_id, *tokenizer.encode(args.prompt).tolist()]
    print(f"sample after step {step}:", file=sys.stderr)
    tokens = prompt[1:]
    shown = ""
    for token in generate(
        model,
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        vocab_size=tokenizer.vocab_size,
        stop_token=tokenizer.eos_id,
        seed=args.seed,
    ):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        # A character may be cut in two by a token: hold it back until it is whole.
        if not text.endswith("\ufffd"):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = tokenizer.decode(tokens)
    print(text[len(shown) :])
    if args.save:
        (args.run_dir / SAMPLE).write_text(text + "\n", encoding="utf-8")


def _check(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: expected 0 or more")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: expected 0 to 2^63 - 1")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: expected more than 0 and at most 1")
