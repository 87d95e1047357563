"""Real documents in the form in which the Pile is published: `.jsonl.zst` of `text` and `meta.pile_set_name`."""

import ast
import io
import json
import sysconfig
from collections import defaultdict
from pathlib import Path

import zstandard

MAX_CHARACTERS = 2000  # of each document, for the time that tokenising takes


def pile_file(folder: Path, materials: Path) -> Path:
    """The real documents that there are: those of the materials folder, else some of the standard library."""
    if (materials / "minipile.jsonl.zst").is_file():
        return materials / "minipile.jsonl.zst"
    path = folder / "stdlib.jsonl.zst"
    lines = [
        json.dumps({"text": text, "meta": {"pile_set_name": label}}) + "\n"
        for label, texts in stdlib_documents().items()
        for text in texts
    ]
    path.write_bytes(zstandard.ZstdCompressor().compress("".join(lines).encode()))
    return path


def stdlib_documents() -> dict[str, list[str]]:
    """Functions and classes of the standard library, as documents of three domains."""
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = {"StdLib (asyncio)": "asyncio", "StdLib-Email": "email", "JSON of StdLib": "json"}
    found: dict[str, list[str]] = defaultdict(list)
    for label, package in packages.items():
        for path in sorted((library / package).rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            lines = source.splitlines(keepends=True)
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    found[label].append("".join(lines[node.lineno - 1 : node.end_lineno]))
    return found


def read_pile(path: Path) -> dict[str, list[str]]:
    """The documents of a file in the Pile's form, by domain, in their order."""
    found: dict[str, list[str]] = defaultdict(list)
    with path.open("rb") as stream, zstandard.ZstdDecompressor().stream_reader(stream) as decompressed:
        for line in io.TextIOWrapper(decompressed, encoding="utf-8"):
            record = json.loads(line)
            found[record["meta"]["pile_set_name"]].append(record["text"][:MAX_CHARACTERS])
    return found
