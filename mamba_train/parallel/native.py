"""The engines that torch itself brings: what they share, and the one for a single device.

Masters, gradients and moments are fp32. A bf16 run computes its matrix products in bf16 by autocast, which
`SelectiveSSM` and its twin switch off for themselves.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from kernels.adamw import FusedAdamW
from mamba_train.checkpoint.pieces import Piece, Pieces
from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.language_model import MambaLM
from mamba_train.model.observe import ScanArguments, observe_scans
from mamba_train.parallel.cast_once import CastOnce
from mamba_train.parallel.engine import Item, Judge, StepResult, accumulate, only_finite
from mamba_train.parallel.graphed import Arguments, GraphedPasses, GraphedUpdate, Variant
from mamba_train.parallel.optimizer import COPY_INTO, forbid_replacing, fused_adamw, local_part, make_optimizer
from mamba_train.parallel.recompute import recompute_activations
from mamba_train.parallel.state import check_drawable, draw_pieces, norms_by_layer
from mamba_train.ranks import Ranks


class NativeEngine:
    """One device, or the ground that DDP and FSDP2 stand on."""

    _is_first, _is_last = True, True  # of the micro-batches of a step
    casts_once = True  # a copy of each matrix for a whole step, see `CastOnce`

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.device = choose_device(config.device, ranks.local_rank)
        self.compute_dtype = choose_dtype(config.precision, self.device)
        if config.compile and self.device.type == "cpu" and not has_compiler():
            raise ValueError(
                "engine.compile=true: compiling for the CPU needs a C++ compiler and none is on the path; "
                "install g++, or use engine.compile=false"
            )
        if config.cuda_graphs and self.device.type != "cuda":
            raise ValueError("engine.cuda_graphs=true: there is no CUDA device to record on; use null or false")

    def prepare(self, model_config: ModelConfig, optim: OptimConfig, seed: int) -> None:
        with torch.device("meta"):
            model = MambaLM(model_config)
        check_drawable(model)
        recompute_activations(model, self.config.recompute, self.device, self.config.recompute_layers)
        self._shard(model)
        model.to_empty(device=self.device)
        self.model_config = model_config
        self._optim = optim
        self._bare_model = model
        self._parameters = dict(model.named_parameters())
        self._optimizer = make_optimizer(self._parameters, optim)
        self._in_place = [p for p in self._parameters.values() if not hasattr(p, "to_local")]  # FSDP2 sees to its parts
        self._addresses: list[int] = []
        forbid_replacing(model, self._optimizer)
        draw_pieces(self.pieces().model, model_config, seed)
        self._casts: CastOnce | None = None
        if self.casts_once and self.compute_dtype is not torch.float32 and not self.config.compile:
            self._casts = CastOnce((m for block in model.blocks() for m in block.modules()), self.compute_dtype)
        if self.config.compile:
            for block in model.blocks():
                block.compile()  # in place, so that parameter names stay as they are
        self.model: nn.Module = self._wrapped(model)
        self._graphed: GraphedPasses | None = None
        if self._records():
            self._graphed = GraphedPasses(self._pass_over, self.ranks.any, self._recorded_in_vain)
            self._graphed.may_record = False
        self._graphed_update = GraphedUpdate(self._update)
        # What an update reads besides: in memory, as a graph has to read it there.
        self._lr, self._divisor = torch.zeros((), device=self.device), torch.ones((), device=self.device)

    def _records(self) -> bool:
        """Whether the passes of a micro-batch become a CUDA graph."""
        return self.device.type == "cuda" and self.config.cuda_graphs is not False

    def _recorded_in_vain(self) -> None:
        """Passes were recorded, in part at least, that will never run."""

    def _shard(self, model: MambaLM) -> None:
        """Cut the parameters, which are still on the meta device."""

    def _wrapped(self, model: MambaLM) -> nn.Module:
        """What the training calls."""
        return model

    def compute(self) -> AbstractContextManager:
        if self._casts is not None:
            self._casts.refresh()
        if self.compute_dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def micro_batches(self, batches: Iterable[Item]) -> Iterator[Item]:
        items = list(batches)
        for number, item in enumerate(items, start=1):
            self._before_micro_batch(is_last=number == len(items))
            yield item

    def _before_micro_batch(self, *, is_last: bool) -> None:
        """Gradients need to be summed over the ranks after the last micro-batch only."""

    def backward(self, loss: Tensor) -> None:
        if self._is_first:
            self._begin_gradients()
        if self._casts is not None:
            self._casts.first = self._is_first
        with self._added_at_once():
            loss.backward()
        self._is_first = False

    def _added_at_once(self) -> AbstractContextManager[object]:
        """Gradients that a pass makes anew are added to those that there are in a few launches, not one for each.

        Without `CastOnce`, whose linear layers add theirs in the product, as they come: all at once would be as much
        memory again.
        """
        others = [] if self._casts is None else [p for p in self._parameters.values() if p not in self._casts.linears]
        return added_at_once(others)

    def _pass_over(self, *arguments: *Arguments, variant: Variant) -> Tensor:
        """What a graph holds; also what is left when recording it has failed, whatever that has changed."""
        self._is_first, self._is_last = variant
        return accumulate(self, *arguments)

    def accumulate(self, inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor) -> Tensor:
        if self._graphed is not None:
            if self._casts is not None:
                self._casts.refresh()
            variant = (self._is_first, self._is_last)
            loss = self._graphed(inputs, targets, seq_idx, n_targets, variant=variant)
            self._is_first = False
            return loss
        return accumulate(self, inputs, targets, seq_idx, n_targets)

    @torch.no_grad()
    def step(self, lr: float, judge: Judge | None = None) -> StepResult:
        self._check_addresses()
        gradients = [local_part(p.grad) for p in self._parameters.values() if p.grad is not None]
        # Squares of fp32 norms can leave the range of fp32. Ranks that have the same part share it.
        square = torch.nn.utils.get_total_norm(gradients).double().square() / self._same_gradients()
        judgement = (judge or only_finite(self))(square)
        by_layer = self._layer_norms() if self.config.layer_grad_norms or judgement.skip else {}
        if not judgement.skip:
            self._lr.fill_(lr)
            self._divisor.fill_(max(1.0, (judgement.grad_norm + 1e-6) / self._optim.max_grad_norm))
            if self._graphed is not None and self._graphed.has_recorded:
                self._graphed_update()
            else:
                self._update()
        self._forget_gradients()
        self._is_first = True
        if self._graphed is not None:
            self._graphed.may_record = True  # every kind of micro-batch has been there
        return StepResult(judgement.grad_norm, judgement.skip, by_layer)

    def _check_addresses(self) -> None:
        """Raise RuntimeError when a weight has moved since the first step: what it was would be updated."""
        addresses = [parameter.data_ptr() for parameter in self._in_place]
        if self._addresses and self._addresses != addresses:
            raise RuntimeError("weights have moved since the first step; " + COPY_INTO)
        self._addresses = addresses

    @torch.no_grad()
    def _update(self) -> None:
        """All that follows the decision to apply a step."""
        if self._fused_adamw is not None:
            gradients = [p.grad for group in self._optimizer.param_groups for p in group["params"]]
            self._fused_adamw([local_part(g) for g in gradients], self._lr, self._divisor)
        else:
            self._apply(self._optimizer)
        if self._casts is not None:
            self._casts.updated(with_copies=self._fused_adamw is not None)

    @cached_property
    def _fused_adamw(self) -> FusedAdamW | None:
        """Made at the first update: FSDP2 may move its shards at the first forward pass."""
        return fused_adamw(self._optimizer, self._optim, {} if self._casts is None else self._casts.copies)

    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = self._lr
            group["capturable"] = self._is_recording()  # torch records only what says so
        optimizer.grad_scale = self._divisor  # type: ignore[attr-defined]
        optimizer.step()  # on gradients divided by that

    def _is_recording(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _begin_gradients(self) -> None:
        """Before the first backward pass of a step. There are none but those of a graph, of which it is no part."""
        if kept := [local_part(p.grad) for p in self._parameters.values() if p.grad is not None]:
            torch._foreach_zero_(kept)

    def _forget_gradients(self) -> None:
        """After a step. Those that a graph makes stay, to be overwritten by the next step's first pass."""
        if self._graphed is None or not self._graphed.has_recorded:
            self._optimizer.zero_grad(set_to_none=True)

    def _layer_norms(self) -> dict[str, float]:
        gradients = {name: local_part(p.grad) for name, p in self._parameters.items() if p.grad is not None}
        return norms_by_layer(gradients, self.ranks, self._same_gradients())

    def _same_gradients(self) -> int:
        """How many ranks have the same part of the gradients: where nothing is cut, all."""
        return self.world_size

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.ranks.sum(value)

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
        # A compiled call would hide its operators from the observer.
        with self.compute(), observe_scans() as records, torch.compiler.set_stance("force_eager"):
            self._bare_model(tokens.to(self.device))
        return records

    def pieces(self) -> Pieces:
        pieces = Pieces({})
        for number, (name, parameter) in enumerate(self._parameters.items()):
            pieces.model[name] = self._piece(parameter, number)
            for key, value in self._optimizer.state[parameter].items():
                pieces.optimizer[f"{name}.{key}"] = self._piece(value, number)
        return pieces

    def _piece(self, tensor: Tensor, number: int) -> Piece:
        """This rank's part of a tensor of parameter `number`; where every rank has all, they take turns to save."""
        return Piece.whole(tensor, saved_here=number % self.world_size == self.rank)

    def pieces_changed(self) -> None:
        pass  # the pieces are the parameters themselves


@contextmanager
def added_at_once(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    kept = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    for parameter, _ in kept:
        parameter.grad = None
    try:
        yield
        pairs = [(grad, parameter.grad) for parameter, grad in kept if parameter.grad is not None]
        if pairs:
            torch._foreach_add_(*zip(*pairs, strict=True))
    finally:
        for parameter, grad in kept:
            parameter.grad = grad


def choose_device(kind: DeviceKind, local_rank: int) -> torch.device:
    """The device of this rank; raises ValueError when there is none for it."""
    has_cuda = torch.cuda.is_available()
    if kind is DeviceKind.cuda and not has_cuda:
        raise ValueError("engine.device=cuda: torch finds no CUDA device; use engine.device=auto or cpu")
    if kind is DeviceKind.cpu or not has_cuda:
        return torch.device("cpu")
    n_devices = torch.cuda.device_count()
    if local_rank >= n_devices:
        raise ValueError(
            f"engine.device={kind}: {local_rank + 1} or more processes on a machine with {n_devices} GPUs; "
            "start one process per GPU, and let each see all of them (srun --gpus-per-node, not --gpus-per-task)"
        )
    return torch.device("cuda", local_rank)


def choose_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Of the matrix products."""
    if precision is Precision.auto:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if precision is Precision.bf16 else torch.float32


def has_compiler() -> bool:
    """Whether there is a C++ compiler on the path."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return any(shutil.which(name) for name in names)
