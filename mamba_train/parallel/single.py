"""The engine for one device: the CPU or one GPU."""

import math
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.contract import decay_split
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM
from mamba_train.model.observe import ScanArguments, observe_scans
from mamba_train.parallel.engine import EngineState, StepResult


class SingleDeviceEngine:
    """fp32 masters on one device; matrix products in fp32 or, by autocast, in bf16."""

    rank = 0
    world_size = 1

    def __init__(self, config: EngineConfig) -> None:
        self.device = _choose_device(config.device)
        self.compute_dtype = _choose_dtype(config.precision, self.device)
        if config.compile and self.device.type == "cpu" and not _has_compiler():
            raise ValueError(
                "engine.compile=true: compiling for the CPU needs a C++ compiler and none is on the path; "
                "install g++, or use engine.compile=false"
            )
        self._compile = config.compile

    def prepare(self, model_config: ModelConfig, optim: OptimConfig, seed: int) -> None:
        with torch.device("meta"):
            model = MambaLM(model_config)
        model.to_empty(device=self.device)
        initialise_(model, model_config, seed)
        self._max_grad_norm = optim.max_grad_norm
        self._parameters = dict(model.named_parameters())
        self._optimizer = _make_optimizer(self._parameters, optim)
        self.model: nn.Module = model
        if self._compile:
            model.compile()  # in place, so that parameter names stay as they are

    def compute(self) -> AbstractContextManager:
        if self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> StepResult:
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # The host must know before the update: a skipped step may touch nothing.
        grad_norm = norm.item()
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._max_grad_norm, norm)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, skipped)

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return value

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}

    def parameter_groups(self) -> list[tuple[float, list[str]]]:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        return [
            (group["weight_decay"], [names[id(parameter)] for parameter in group["params"]])
            for group in self._optimizer.param_groups
        ]

    @torch.no_grad()
    def observe_forward(self, tokens: Tensor) -> list[ScanArguments]:
        with self.compute(), observe_scans() as records:
            # `forward` itself: a compiled call would hide its operators from the observer.
            self.model.forward(tokens.to(self.device))
        return records

    def state(self) -> EngineState:
        model = {name: _to_cpu(parameter) for name, parameter in self._parameters.items()}
        optimizer = {
            f"{name}.{key}": _to_cpu(value)
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state[parameter].items()
        }
        return EngineState(model, optimizer)

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(state.model[name])
            # Before the first update (every step so far was skipped) there is no optimiser state.
            if f"{name}.step" in state.optimizer:
                self._optimizer.state[parameter] = {
                    key: state.optimizer[f"{name}.{key}"].to(self.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }


def _make_optimizer(parameters: dict[str, nn.Parameter], optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101, algorithm 2) with the decay groups of the contract."""
    decayed, undecayed = decay_split(parameters)
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": optim.weight_decay},
        {"params": [parameters[name] for name in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)


def _choose_device(kind: DeviceKind) -> torch.device:
    if kind is DeviceKind.cuda and not torch.cuda.is_available():
        raise ValueError("engine.device=cuda: torch finds no CUDA device; use engine.device=auto or cpu")
    if kind is DeviceKind.auto:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(kind.value)


def _choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if precision is Precision.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def _has_compiler() -> bool:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return any(shutil.which(name) for name in names)


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
