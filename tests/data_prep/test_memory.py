"""Memory does not grow with the size of the input, only with its longest document."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_prep.helpers import REPOSITORY

# The peak of this program alone: getrusage would count the process that started it, too.
PEAK_MIB = """
def peak_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
"""
PEAK = (
    PEAK_MIB
    + """
import sys
from pathlib import Path
from tests.data_prep.helpers import make_shards
raw, out, tokenizer = sys.argv[1:]
make_shards([raw], Path(out), Path(tokenizer), label_key=None)
print(peak_mib())
"""
)
INDEX = (
    PEAK_MIB
    + """
import sys
from pathlib import Path
import numpy as np
from mamba_train.data.shards import ShardReader, ShardWriter
before = peak_mib()
prefix = Path(sys.argv[1])
one = np.array([7], dtype=np.uint16)
with ShardWriter(prefix, np.dtype(np.uint16), 0) as writer:
    for _ in range(10_000_000):
        writer.add(one, 1)
    writer.close()
shard = ShardReader(prefix)
assert len(shard) == 10_000_000 and shard.document(9_999_999).tolist() == [7, 0]
print(peak_mib() - before)
"""
)


def run(script: str, *arguments: object) -> int:
    """What a script prints last: MiB."""
    line = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def write(path: Path, text: str, n_bytes: int, documents: int) -> None:
    path.parent.mkdir(parents=True)
    line = json.dumps({"text": text * (n_bytes // documents // len(text))}) + "\n"
    with path.open("w") as stream:
        for _ in range(documents):
            stream.write(line)


SENTENCE = "Call me Ishmael. Some years ago—never mind how long precisely—having little money in my purse,\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_document_of_200_megabytes(tmp_path: Path, tokenizer_file: Path) -> None:
    write(tmp_path / "many" / "a.jsonl", SENTENCE, 20_000_000, documents=2000)
    write(tmp_path / "one" / "a.jsonl", SENTENCE, 200_000_000, documents=1)
    many = run(PEAK, tmp_path / "many", tmp_path / "out-many", tokenizer_file)
    one = run(PEAK, tmp_path / "one", tmp_path / "out-one", tokenizer_file)
    print(f"peak memory: {many} MiB for small documents, {one} MiB for one of 200 MB")
    # docs/data.md states the bound: 400 MiB and 12 bytes for each byte of the longest document.
    assert many < 400
    assert one < 400 + 12 * 200


@pytest.mark.slow
def test_ten_million_documents_in_one_shard(tmp_path: Path) -> None:
    grown = run(INDEX, tmp_path / "shard")
    print(f"memory for ten million documents: {grown} MiB")
    assert grown < 600
