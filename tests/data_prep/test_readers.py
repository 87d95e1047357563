"""Our shards are what Megatron's own reader takes them for."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from mamba_train.data.shards import ShardReader
from tests.data_prep.helpers import REPOSITORY, Row, make_shards

# In a process of its own: importing megatron.core changes settings of torch.
READ = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
found = []
for prefix in sys.argv[1:]:
    dataset = IndexedDataset(prefix)
    found.append({
        "documents": [dataset[i].tolist() for i in range(len(dataset))],
        "document_index": dataset.document_indices.tolist(),
        "dtype": str(dataset.index.dtype.__name__),
    })
print(json.dumps(found))
"""


def read_by_megatron(prefixes: list[Path]) -> list[dict[str, object]]:
    if find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    command = [sys.executable, "-W", "ignore", "-c", READ, *map(str, prefixes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_megatron_reads_our_shards(
    tmp_path: Path, pile: Callable[..., dict[str, list[Row]]], tokenizer_file: Path, materials: Path
) -> None:
    pile(2)
    manifest = make_shards([f"{tmp_path}/raw/train"], tmp_path / "out", tokenizer_file)
    assert manifest is not None
    prefixes = [tmp_path / "out" / entry.name for entry in manifest.shards["train"]]
    prefixes.append(materials / "megatron_gpt2" / "meg-gpt2-openwebtext_text_document")  # and we read theirs
    for prefix, theirs in zip(prefixes, read_by_megatron(prefixes), strict=True):
        ours = ShardReader(prefix)
        assert theirs["documents"] == [ours.document(i).tolist() for i in range(len(ours))]
        assert theirs["document_index"] == list(range(len(ours) + 1))
        assert theirs["dtype"] == "uint16"
