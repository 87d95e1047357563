"""Train a byte-level BPE on a sample of the text: the first part of every input, the same share of each.

  python -m data_prep train-tokenizer --preset pile --input 'PILE/train/*.jsonl.zst' --vocab-size 50277 \\
      --output tokenizer.json

The same inputs give the same file. With --preset dna there is nothing to learn: one token per base is written.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from data_prep.options import PRESETS, add_input_options, fields_of, hub_options, positive, preset_of
from data_prep.progress import Bar
from mamba_train.config_data import BadDocuments
from mamba_train.data.bad_documents import BadDocumentFilter
from mamba_train.data.hub_text import read_hub
from mamba_train.data.shard_job import Input, find_inputs
from mamba_train.data.shards import replace_durably
from mamba_train.data.text_files import Fields, read_texts
from mamba_train.data.tokenizer import dna_tokenizer, train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_input_options(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=positive, default=50277, help="tokens, bytes and end included (50277)")
    parser.add_argument(
        "--sample-mib", type=positive, default=200, help="MiB of text to learn from, over all inputs (200)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Read the sample, train, write."""
    output: Path = arguments.output.expanduser()
    if output.is_dir():
        raise ValueError(f"--output {output}: is a folder; expected the name of a file, such as tokenizer.json in it")
    if arguments.preset and PRESETS[arguments.preset].tokenizer == "dna":
        tokenizer = dna_tokenizer()
    else:
        inputs, paths = find_inputs(
            arguments.input, arguments.split, preset_of(arguments).suffixes, hub_options(arguments), print
        )
        bad = BadDocumentFilter(
            BadDocuments(arguments.bad_documents), arguments.max_bad_share, print, "--bad-documents", "--max-bad-share"
        )
        n_bytes = arguments.sample_mib << 20
        with Bar("reading the sample", n_bytes) as bar:
            texts = _sample([i for i in inputs if i.split == "train"], paths, fields_of(arguments), bad, n_bytes, bar)
            tokenizer = train_tokenizer(texts, arguments.vocab_size, n_bytes, "--vocab-size")
        bad.check_share("the sample")
        if not bad.n_good.total():
            raise ValueError("--input: there is no text to learn from (only inputs of the train split are read)")
    if tokenizer.vocab_size < arguments.vocab_size and arguments.preset != "dna":
        print(f"the text is too small for more than {tokenizer.vocab_size:,} tokens (--vocab-size, --sample-mib)")
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_durably(output, tokenizer.serialised)
    print(
        f"{output}: {tokenizer.vocab_size:,} tokens, end of document {tokenizer.eos_id}, SHA-256 {tokenizer.sha256:.12}"
    )


def _sample(
    inputs: list[Input], paths: dict[str, Path], fields: Fields, bad: BadDocumentFilter, n_bytes: int, bar: Bar
) -> Iterator[str]:
    """The same number of bytes from the beginning of each input; what a short one leaves goes to the next."""
    left = n_bytes
    for number, entry in enumerate(inputs):
        budget = left // (len(inputs) - number)
        where = paths.get(entry.name, entry.name)
        records = read_hub(entry.hub, fields) if entry.hub else read_texts(Path(where), fields)
        for record in bad.usable(entry.name, where, records):
            if budget <= 0:
                break
            budget -= record.n_bytes
            left -= record.n_bytes
            bar.update(n_bytes - left)
            yield record.text
