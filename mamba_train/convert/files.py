"""The files of a folder of published weights: read without running anything that is in them, written at once."""

import json
import os
import pickle
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mamba_train.checkpoint.disk import GIB, is_disk_full

CONFIG_JSON = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
INDEX = ".index.json"
_ZIP_MAGIC = b"PK\x03\x04"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError that names the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file; expected a folder of published weights") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, on the CPU, in the dtype they are stored in; safetensors before .bin files.

    Raises ValueError naming the file that is missing, damaged, or holds more than tensors.
    """
    for single in (SAFETENSORS, BIN):
        if (folder / single).is_file():
            return _read_file(folder / single)
        if (folder / f"{single}{INDEX}").is_file():
            return _read_parts(folder / f"{single}{INDEX}")
    raise ValueError(f"{folder}: no weights here; expected {SAFETENSORS} or {BIN}, or their {INDEX}")


def _read_parts(index: Path) -> dict[str, Tensor]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ValueError(f"{index}: there is no weight_map in it")
    merged: dict[str, Tensor] = {}
    for part in sorted(map(str, set(names.values()))):
        # A name with a folder in it could point anywhere on this machine.
        if Path(part).name != part:
            raise ValueError(f"{index}: {part!r} is not the name of a file of this folder")
        merged |= _read_file(index.parent / part)
    return merged


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file, the index beside it names it")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own kinds for damaged files
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from None
    return _read_bin(path)


def _read_bin(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        # weights_only: nothing but tensors is built from the pickle inside.
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        called = re.search(r"GLOBAL (\S+) was not", str(error))
        reason = f"it calls {called.group(1)}" if called else "it is no file of plain tensors"
        raise ValueError(
            f"{path}: refused, because reading it could run code ({reason}); ask its author for safetensors"
        ) from None
    except Exception as error:  # torch raises RuntimeError, EOFError and others for damaged files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a readable file of weights ({reason})") from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{path}: refused, because it is not a plain dictionary of tensors")
    return values


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file as transformers expects it."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read


def write_bin(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file as mamba_ssm expects it, which reads no other kind; it holds tensors only."""
    torch.save(dict(tensors), path)


@contextmanager
def new_folder(target: Path, n_bytes: int) -> Iterator[Path]:
    """A folder to fill that becomes `target` at the end, whole, or leaves nothing behind.

    Raises ValueError when `target` exists, and when `n_bytes` do not fit or the disk fills up.
    """
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} exists already; choose another place, nothing is overwritten")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise ValueError(f"{target}: {n_bytes / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free")
    folder = target.parent / f".writing.{target.name}.{os.getpid()}.{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            raise ValueError(f"{target} was made by someone else meanwhile; nothing is overwritten")
        os.rename(folder, target)
    except Exception as error:
        if is_disk_full(error):
            raise ValueError(f"{target}: the disk became full; nothing was left there") from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
