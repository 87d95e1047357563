"""`mamba-train generate RUN`: text that a trained model writes."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mamba_train.run_folder import SAMPLE, replace

if TYPE_CHECKING:
    from mamba_train.data.tokenizer import TextTokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "source",
        type=os.path.expanduser,
        metavar="RUN",
        help="folder of a run (its newest checkpoint), of a checkpoint, or of published weights",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="TEXT", help="to continue (default: begin a document); several at once"
    )
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token each time")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens (default: all)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the tokens with this much probability")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; several are possible"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws; the second prompt draws with SEED + 1")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of matrices (default: bf16 on a GPU, else fp32)")
    parser.add_argument(
        "--state-precision",
        choices=["fp32", "fp16", "bf16"],
        help="of what is remembered between tokens, which is rounded at each (default: fp16 if matrices are bf16)",
    )
    parser.add_argument("--save", action="store_true", help=f"also write the text to RUN/{SAMPLE}")


def run(args: argparse.Namespace) -> None:
    """Write prompts and what continues them, a single one as it grows; raises ValueError for bad arguments."""
    _check(args)
    import torch

    from mamba_train.convert.source import load_pretrained
    from mamba_train.data.tokenizer import TextTokenizer
    from mamba_train.inference.load import inference_model
    from mamba_train.inference.sampling import Sampling
    from mamba_train.inference.text import generate_text

    pretrained = load_pretrained(args.source, lambda line: print(line, file=sys.stderr))
    if pretrained.tokenizer is None:
        raise ValueError(f"{args.source}: there is no tokenizer.json here, without which there is no text")
    tokenizer = TextTokenizer(pretrained.tokenizer, f"the tokenizer of {args.source}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device; use --device cpu")
    precision = args.precision or ("bf16" if args.device == "cuda" else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = inference_model(pretrained.config, pretrained.tensors, torch.device(args.device), dtype)
    if pretrained.step is not None:
        print(f"sample after step {pretrained.step}:", file=sys.stderr)
    state_dtypes = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    texts = args.prompt or [""]
    alone = len(texts) == 1

    def show(row: int, text: str) -> None:
        if alone:
            print(text, end="", flush=True)

    prompts = [[tokenizer.eos_id, *_encoded(tokenizer, text)] for text in texts]
    show(0, texts[0])
    continued = generate_text(
        model,
        tokenizer,
        prompts,
        Sampling(args.temperature, args.top_k, args.top_p, args.seed),
        max_new_tokens=args.max_new_tokens,
        stop_strings=args.stop,
        on_text=show,
        state_dtype=state_dtypes[args.state_precision],
    )
    whole = [prompt + text for prompt, text in zip(texts, continued, strict=True)]
    if alone:
        print()
    else:
        print("\n".join(f"--- {number} ---\n{text}" for number, text in enumerate(whole, start=1)))
    if args.save:
        replace(Path(args.source) / SAMPLE, "\n".join(whole) + "\n")


def _encoded(tokenizer: "TextTokenizer", prompt: str) -> list[int]:
    """Token ids of a prompt; a vocabulary without all bytes may have none for some of its characters."""
    try:
        ids: list[int] = tokenizer.encode(prompt).tolist()
    except ValueError as error:
        raise ValueError(f"--prompt {prompt!r}: {error}") from error
    if prompt and not ids:
        raise ValueError(f"--prompt {prompt!r}: the tokenizer of these weights has a token for none of its characters")
    if (read := tokenizer.decode(ids)) != prompt:
        print(f"warning: --prompt {prompt!r}: the tokenizer makes {read!r} of it", file=sys.stderr)
    return ids


def _check(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: expected at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: expected 0 or more")
    if args.top_k is not None and args.top_k < 1:
        raise ValueError(f"--top-k {args.top_k}: expected at least 1")
    if not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed}: expected 0 to 2^63 - 1")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: expected more than 0 and at most 1")
    if "" in args.stop:
        raise ValueError("--stop '': expected a text of at least one character")
    for option, given in (("--prompt", args.prompt or []), ("--stop", args.stop)):
        for text in given:
            if any("\ud800" <= character <= "\udfff" for character in text):  # what Python makes of other bytes
                raise ValueError(f"{option} {text!a}: expected text in UTF-8")
    if args.save and not Path(args.source).is_dir():
        raise ValueError(f"--save: {args.source} is no folder here to write {SAMPLE} into")
