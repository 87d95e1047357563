"""Named tensors to and from safetensors files."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the data of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_tensors(group: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the tensor, unless each is plain, contiguous and owns its bytes alone.

    A file holds every tensor once: two names for the same bytes (tied weights) would come back as two
    independent tensors, and a later step would train them apart.
    """
    spans = []
    for name, tensor in tensors.items():
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            raise ValueError(f"{group} tensor '{name}' must be a dense torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"{group} tensor '{name}' is on the meta device: it has no data to save")
        if not tensor.is_contiguous():
            raise ValueError(
                f"{group} tensor '{name}' {tuple(tensor.shape)} is not contiguous (strides "
                f"{tensor.stride()}): save its .contiguous() copy"
            )
        if tensor.numel():
            start = tensor.data_ptr()
            spans.append((str(tensor.device), start, start + tensor.numel() * tensor.element_size(), name))
    spans.sort()
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(spans):
        if device == next_device and start < end:
            raise ValueError(
                f"{group} tensors '{name}' and '{next_name}' share memory: save a tied weight under one name"
            )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file; a full disk surfaces as safetensors' own exception (see `disk`)."""
    save_file(dict(tensors), path)


def read_tensors(files: Iterable[Path], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Tensors of several files together; raises ValueError when a name is in two of them."""
    merged: dict[str, Tensor] = {}
    for file in files:
        # The default backend maps the file: tensors would change, or the process die, with the file.
        tensors = load_file(file, device=str(device), backend="pread")
        if twice := merged.keys() & tensors.keys():
            raise ValueError(f"{file.parent.name}/{file.name}: '{min(twice)}' is also in another file")
        merged.update(tensors)
    return merged
