"""The random states of a process as tensors, to be stored and put back without pickle."""

import json
import random
import sys
from typing import Any

import torch
from torch import Tensor

PYTHON = "python"
NUMPY = "numpy"
TORCH_CPU = "torch_cpu"
TORCH_CUDA = "torch_cuda"


def capture() -> dict[str, Tensor]:
    """Random states as 1-D uint8 tensors: Python, numpy (if imported), torch CPU, the current CUDA device.

    Only the current device, and only if it is in use: one rank drives one device, and asking another
    one for its state would open a context on it.
    """
    states = {PYTHON: _to_tensor(random.getstate()), TORCH_CPU: torch.get_rng_state()}
    if "numpy" in sys.modules:
        import numpy

        states[NUMPY] = _to_tensor(numpy.random.get_state(legacy=False))
    if torch.cuda.is_initialized():
        states[TORCH_CUDA] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Tensor]) -> list[str]:
    """Put back the states of `capture`; returns the names that this process has no generator for.

    That is the CUDA state when a run goes on without a GPU; the caller should say so in its log.
    """
    ignored = []
    for name, state in states.items():
        if name == PYTHON:
            version, internal, gauss_next = _from_tensor(state)
            random.setstate((version, tuple(internal), gauss_next))
        elif name == NUMPY:
            import numpy

            numpy.random.set_state(_from_tensor(state))
        elif name == TORCH_CPU:
            torch.set_rng_state(state)
        elif name == TORCH_CUDA and torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
        else:
            ignored.append(name)
    return ignored


def _to_tensor(value: Any) -> Tensor:
    # numpy's state holds arrays; their lists are accepted back as they are.
    text = json.dumps(value, default=lambda array: array.tolist())
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _from_tensor(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.tolist()))
