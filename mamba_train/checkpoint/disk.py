"""Free space, and bytes that are on the disk and not only on their way to it."""

import errno
import os
import re
import shutil
from pathlib import Path

GIB = 2**30
_MARGIN_BYTES = 2**20  # the JSON files, the headers of the tensor files, the folders themselves
_MARGIN_SHARE = 0.01  # blocks that are only partly filled
_FULL = (errno.ENOSPC, errno.EDQUOT)


class NotEnoughDiskSpace(OSError):
    """A checkpoint does not fit on its disk; nothing of it is left there."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC


def _existing_ancestor(folder: Path) -> Path:
    folder = folder.absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(_existing_ancestor(folder)).free


def _message(folder: Path, what: str, size_bytes: int, reserve_gib: float) -> str:
    size_gib, free_gib = size_bytes / GIB, _free_bytes(folder) / GIB
    return (
        f"{what} in {folder}: {size_gib + reserve_gib:.3f} GiB needed ({size_gib:.3f} for the checkpoint, "
        f"{reserve_gib:g} to stay free), {free_gib:.3f} GiB free; make room, or lower "
        f"checkpoint.reserve_gib or checkpoint.keep_last"
    )


def require_free_space(folder: Path, tensor_bytes: int, reserve_gib: float) -> None:
    """Raise NotEnoughDiskSpace unless tensors, a margin and the reserve fit where `folder` is or will be."""
    size_bytes = tensor_bytes + int(tensor_bytes * _MARGIN_SHARE) + _MARGIN_BYTES
    if _free_bytes(folder) < size_bytes + reserve_gib * GIB:
        raise NotEnoughDiskSpace(_message(folder, "no space for a checkpoint", size_bytes, reserve_gib))


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says that the disk, or the user's quota on it, is full."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors writes outside Python and reports the system's error number in its message only.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found is not None and int(found.group(1)) in _FULL


def disk_became_full(folder: Path, tensor_bytes: int, reserve_gib: float) -> NotEnoughDiskSpace:
    """The error for a disk that filled up after the check had passed."""
    return NotEnoughDiskSpace(
        _message(folder, "the disk, or a quota on it, became full during the save", tensor_bytes, reserve_gib)
    )


def fsync(path: Path) -> None:
    """Return only when a file's bytes, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems cannot do this for folders; for files it must work.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)
