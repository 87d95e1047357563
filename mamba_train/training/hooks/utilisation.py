"""How well the device is used: MFU and memory."""

import resource
import sys

import torch

from mamba_train.monitor.flops import FlopsPerToken, PeakFlops, mfu
from mamba_train.training.hooks.base import Hook, Metrics
from mamba_train.training.trainer import Trainer

GIB = 2**30


class UtilisationHook(Hook):
    """Adds `mfu` and `memory_gib` (peak so far: of the GPU, or of this process on the CPU)."""

    def __init__(self, flops: FlopsPerToken, peak: PeakFlops) -> None:
        self._flops = flops
        self._peak = peak

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        tokens_per_second = metrics["tokens_per_second"]
        assert tokens_per_second is not None
        metrics["mfu"] = mfu(tokens_per_second / trainer.engine.world_size, self._flops, self._peak)
        metrics["memory_gib"] = _peak_memory_bytes(trainer.engine.device) / GIB


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
