"""Named tensors, and parts of them, to and from safetensors files.

Each file says in its header which block of each tensor it holds, in the terms of
`torch.distributed.checkpoint`, whose planner finds the bytes when another number of ranks, or another engine,
reads what was written.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from mamba_train.checkpoint import layout
from mamba_train.checkpoint.pieces import Piece, rectangles

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


def write_pieces(folder: Path, rank: int, pieces: Mapping[str, Piece]) -> list[Path]:
    """Write what a rank holds and return the files; a full disk surfaces as safetensors' own exception.

    A file holds one block of a tensor. So the first block of each piece goes to the first file, the second to the
    second, and most ranks of most engines write one file.
    """
    parts: list[dict[str, tuple[tuple[int, ...], Tensor]]] = []
    for name, piece in pieces.items():
        for number, block in enumerate(rectangles(piece)):
            if number == len(parts):
                parts.append({})
            parts[number][name] = (block.offsets, block.values)
    paths = []
    for number, blocks in enumerate(parts):
        paths.append(folder / layout.rank_file(rank, number))
        # Not HuggingFaceStorageWriter: it builds the file in memory first, which doubles what a save needs.
        offsets = {name: {SAVED_OFFSETS_KEY: list(place)} for name, (place, _) in blocks.items()}
        metadata = {CUSTOM_METADATA_KEY: json.dumps(offsets), "format": "pt"}
        save_file({name: values for name, (_, values) in blocks.items()}, paths[-1], metadata)
    return paths


def read_tensors(files: Iterable[Path], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The whole tensors in several files together; raises ValueError when blocks are missing or there twice."""
    files = list(files)
    found = _contents(files)
    tensors = {name: torch.empty(of.size, dtype=of.properties.dtype, device=device) for name, of in found.items()}
    read_pieces(files, {name: Piece.whole(tensor) for name, tensor in tensors.items()})
    return tensors


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in several files together; only headers are read."""
    return {name: tuple(of.size) for name, of in _contents(files).items()}


def read_pieces(files: Sequence[Path], pieces: Mapping[str, Piece]) -> None:
    """Fill the values of `pieces` from the files, whoever wrote them; each rank reads only what it needs.

    Raises ValueError when a tensor is missing, has another shape, or when blocks are missing or there twice.
    """
    found = _contents(files)
    for name, piece in pieces.items():
        if name not in found:
            raise ValueError(f"there is no tensor '{name}' in the files of {_place(files)}")
        if tuple(found[name].size) != piece.shape:
            raise ValueError(f"'{name}' has shape {tuple(found[name].size)}, expected {piece.shape}")
    pieces = {name: piece for name, piece in pieces.items() if piece.values.numel()}
    if not pieces:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        # no_dist: the headers say everything, so no rank needs another one to plan its reads.
        dcp.load({}, storage_reader=_Reader(files), planner=_Planner(pieces), no_dist=True)


class _Planner(DefaultLoadPlanner):
    """Reads the blocks of pieces."""

    def __init__(self, pieces: Mapping[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._blocks = {
            name: {torch.Size(block.offsets): block.values for block in rectangles(piece)}
            for name, piece in pieces.items()
        }

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        reads = []
        for name, blocks in self._blocks.items():
            chunks = [ChunkStorageMetadata(offsets, values.shape) for offsets, values in blocks.items()]
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            reads += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(reads)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, "a piece is made of blocks"
        return self._blocks[index.fqn][index.offset]


class _Reader(HuggingFaceStorageReader):
    """Reads the given files only: what else lies in their folder is not part of the checkpoint."""

    def __init__(self, files: Sequence[Path]) -> None:
        super().__init__(_place(files))
        self.fs = _Listed(files)


class _Listed(FileSystem):
    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [str(file) for file in files]

    def ls(self, path: object) -> list[str]:
        return self._files


def _contents(files: Sequence[Path]) -> dict[str, TensorStorageMetadata]:
    """What the headers say of each tensor."""
    if not files:
        return {}
    found = {}
    for name, of in _Reader(files).read_metadata().state_dict_metadata.items():
        assert isinstance(of, TensorStorageMetadata)
        found[name] = of
        held = sum(chunk.sizes.numel() for chunk in of.chunks)
        if held != of.size.numel():
            missing = "is there twice" if held > of.size.numel() else "is not complete"
            raise ValueError(f"'{name}' {missing} in the files of {_place(files)}")
    return found


def _place(files: Sequence[Path]) -> str:
    return str(files[0].parent) if files else "(none)"
