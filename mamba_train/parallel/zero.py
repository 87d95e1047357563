"""DeepSpeed ZeRO: what is cut over the ranks is the optimiser's state (stage 1), gradients too (2), weights too (3).

Weights are fp32 and a bf16 run computes by `torch_autocast`, as the native engines do; DeepSpeed's own bf16 mode casts
all weights, `A_log` among them, and is not reachable from here. Its optimiser sees flat tensors, one per group or
sub-group of parameters; the addresses of a parameter's part in them are what this module translates into pieces.
"""

import importlib.util
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mamba_train.checkpoint.pieces import Piece, Pieces
from mamba_train.config import DeviceKind, EngineConfig, ModelConfig, OptimConfig, Precision
from mamba_train.model.language_model import MambaLM
from mamba_train.model.observe import ScanArguments, observe_scans
from mamba_train.model.projection import Projection
from mamba_train.parallel.engine import Item, Judge, StepResult, accumulate, only_finite
from mamba_train.parallel.native import choose_device, choose_dtype
from mamba_train.parallel.optimizer import adamw
from mamba_train.parallel.recompute import recompute_activations
from mamba_train.parallel.state import check_drawable, draw_pieces, norms_by_layer
from mamba_train.ranks import Ranks, lone_group

# How much is in flight at once, in numbers of elements; DeepSpeed's own values suit models of tens of billions.
REDUCED_ELEMENTS = 50_000_000  # gradients that are summed together
GATHERED_ELEMENTS = 200_000_000  # stages 1 and 2: weights that are gathered together after the update
PREFETCHED_ELEMENTS = 50_000_000  # stage 3: weights on their way
LIVE_ELEMENTS = 200_000_000  # stage 3: weights that may stay gathered


class ZeroEngine:
    """A DeepSpeed engine with torch's AdamW over the groups of the contract."""

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.device = choose_device(config.device, ranks.local_rank)
        self.compute_dtype = choose_dtype(config.precision, self.device)
        self._deepspeed = _import_deepspeed(self.device)
        lone_group()
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        os.environ.setdefault("LOCAL_RANK", str(ranks.local_rank))  # srun does not set it
        self._deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)

    def prepare(self, model_config: ModelConfig, optim: OptimConfig, seed: int) -> None:
        settings = self._settings(optim)
        if self.config.zero_stage == 3:
            # Each parameter is cut as soon as its module is made. No dtype here: what is given is not always what is
            # taken, and weights that began as bf16 stay rounded. Without one the config decides, which says fp32.
            with self._deepspeed.zero.Init(config_dict_or_path=settings):
                model = MambaLM(model_config)
            if model.lm_head is None:  # the root uses a weight of one of its modules
                self._deepspeed.zero.register_external_parameter(model, model.embedding.weight)
        else:
            with torch.device("meta"):
                model = MambaLM(model_config)
            model.to_empty(device=self.device)
        check_drawable(model)
        piece_of = self._stage_3_piece if self.config.zero_stage == 3 else Piece.whole
        draw_pieces({name: piece_of(p) for name, p in model.named_parameters()}, model_config, seed)
        recompute_activations(model, self.config.recompute, self.device, self.config.recompute_layers)
        self.model_config = model_config
        self._parameters = dict(model.named_parameters())
        optimizer = adamw(self._parameters, optim)
        self._engine, self._zero, _, _ = self._deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self._optimizer: torch.optim.Optimizer = self._zero.optimizer
        for flat in self._flat_partitions():
            # torch makes it at the first step; a checkpoint has something to fill before that.
            zeros = {key: torch.zeros_like(flat, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
            self._optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **zeros}
        self._take_over_norm()
        self.model: nn.Module = self._engine

    def _settings(self, optim: OptimConfig) -> dict[str, Any]:
        autocast: dict[str, Any] = {"enabled": self.compute_dtype is torch.bfloat16, "dtype": "bfloat16"}
        # Modules whose gradients travel in the dtype of the computation; DeepSpeed looks for the classes themselves.
        reduced = [] if self.config.reduce_precision is Precision.fp32 else [nn.Linear, Projection]
        autocast["lower_precision_safe_modules"] = [f"{kind.__module__}.{kind.__name__}" for kind in reduced]
        return {
            "train_micro_batch_size_per_gpu": 1,  # the loop counts, not DeepSpeed
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.max_grad_norm,
            "zero_optimization": {
                "stage": self.config.zero_stage,
                "reduce_bucket_size": REDUCED_ELEMENTS,
                "allgather_bucket_size": GATHERED_ELEMENTS,
                "stage3_prefetch_bucket_size": PREFETCHED_ELEMENTS,
                "stage3_max_live_parameters": LIVE_ELEMENTS,
                "stage3_max_reuse_distance": LIVE_ELEMENTS,
                "stage3_param_persistence_threshold": 0,
            },
            "torch_autocast": autocast,
            "steps_per_print": 2**62,
        }

    def compute(self) -> AbstractContextManager:
        return nullcontext()  # DeepSpeed's forward enters autocast by itself

    def micro_batches(self, batches: Iterable[Item]) -> Iterator[Item]:
        items = list(batches)
        for number, item in enumerate(items, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(items))
            yield item

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed takes the mean over the ranks.
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def accumulate(self, inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor) -> Tensor:
        return accumulate(self, inputs, targets, seq_idx, n_targets)

    @torch.no_grad()
    def step(self, lr: float, judge: Judge | None = None) -> StepResult:
        norm = self._global_norm()
        # All ranks have the norm of the whole gradient; below 0 stands for one that is not finite.
        square = torch.where(norm < 0, math.nan, norm).double().square() / self.world_size
        judgement = (judge or only_finite(self))(square)
        by_layer = {}
        if self.config.layer_grad_norms or judgement.skip:
            by_layer = norms_by_layer(self._gradients(), self.ranks)
        # DeepSpeed asks for the norm again, and makes no update when it is not finite.
        self._norm_for_update = torch.full_like(norm, math.inf) if judgement.skip else norm
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        assert bool(self._zero.overflow) == judgement.skip
        return StepResult(judgement.grad_norm, judgement.skip, by_layer)

    def _take_over_norm(self) -> None:
        """Let DeepSpeed's step use the norm that was judged, in the place of one that it computes itself."""
        if self.config.zero_stage < 3:
            self._global_norm: Callable[[], Tensor] = self._zero.scaled_global_norm
            self._zero.scaled_global_norm = lambda: self._norm_for_update
            return
        norms_of_groups = self._zero._get_norm_groups

        def global_norm() -> Tensor:
            norms = torch.stack(norms_of_groups())
            return torch.linalg.vector_norm(torch.where(norms < 0, math.nan, norms))

        self._global_norm = global_norm
        self._zero._get_norm_groups = lambda: [self._norm_for_update]

    def _gradients(self) -> dict[str, Tensor]:
        """This rank's part of the summed gradient of each parameter, between the backward pass and the update."""
        found = {}
        for name, parameter in self._parameters.items():
            if self.config.zero_stage == 3:
                n = self._stage_3_piece(parameter).values.numel()
                found[name] = self._deepspeed.utils.safe_get_local_grad(parameter)[:n]
                continue
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                found[name] = torch.zeros(0, device=self.device)
                continue
            index = parameter._index_in_param_group  # type: ignore[attr-defined]
            gradient = mapping.get_lp_grad_fragment(index).flatten()
            if gradient.numel() != mapping.lp_fragment.numel():  # the whole gradient, of which a part is this rank's
                gradient = gradient.narrow(0, mapping.lp_fragment_address.start, mapping.lp_fragment.numel())
            found[name] = gradient
        return found

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        return self.ranks.sum(value)

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: _shape(parameter) for name, parameter in self._parameters.items()}

    def parameter_groups(self) -> list[tuple[float, list[str]]]:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        groups = self._optimizer.param_groups
        if self.config.zero_stage < 3:
            members = list(enumerate(self._zero.bit16_groups))
        else:
            members = [(self._zero.sub_group_to_group_id[i], group) for i, group in enumerate(self._zero.fp16_groups)]
        return [(groups[number]["weight_decay"], [names[id(p)] for p in part]) for number, part in members]

    @torch.no_grad()
    def observe_forward(self, tokens: Tensor) -> list[ScanArguments]:
        with observe_scans() as records:
            self._engine(tokens.to(self.device))
        return records

    def pieces(self) -> Pieces:
        pieces = Pieces({})
        for name, parameter in self._parameters.items():
            flat, address, start, n = self._address(parameter)
            shape = _shape(parameter)
            pieces.model[name] = Piece(shape, start, flat.detach()[address : address + n])
            state = self._optimizer.state[flat]
            for key in ("exp_avg", "exp_avg_sq"):
                pieces.optimizer[f"{name}.{key}"] = Piece(shape, start, state[key][address : address + n])
            # One count for all parameters of a group: every step updates all of them.
            pieces.optimizer[f"{name}.step"] = Piece.whole(state["step"], saved_here=self.rank == 0)
        return pieces

    def pieces_changed(self) -> None:
        if self.config.zero_stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()  # what is still gathered from a forward pass is out of date
        for number in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(number)

    def _flat_partitions(self) -> list[Tensor]:
        """The fp32 tensors that this rank's optimiser updates."""
        if self.config.zero_stage < 3:
            return list(self._zero.single_partition_of_fp32_groups)
        return list(self._zero.fp32_partitioned_groups_flat)

    def _address(self, parameter: nn.Parameter) -> tuple[Tensor, int, int, int]:
        """(flat tensor, offset in it, offset in the parameter, elements) of this rank's part of a parameter."""
        if self.config.zero_stage == 3:
            group, offset, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            piece = self._stage_3_piece(parameter)
            return self._zero.fp32_partitioned_groups_flat[group], offset, piece.start, piece.values.numel()
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:  # all of it is on other ranks
            group = next(i for i, group in enumerate(self._zero.bit16_groups) if any(p is parameter for p in group))
            return self._zero.single_partition_of_fp32_groups[group], 0, 0, 0
        flat = self._zero.single_partition_of_fp32_groups[mapping.param_group_index]
        return flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment.numel()

    def _stage_3_piece(self, parameter: nn.Parameter) -> Piece:
        """This rank's part of a parameter of stage 3; the last part is filled up to the size of the others."""
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        shape = _shape(parameter)
        start = self.rank * part.numel()
        n = max(0, min(part.numel(), math.prod(shape) - start))
        return Piece(shape, start if n else 0, part.detach()[:n])


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    # Under stage 3 the parameter itself is empty.
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _import_deepspeed(device: torch.device) -> Any:
    """The package, told to be quiet and to compile nothing; raises ValueError when it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("engine=deepspeed: DeepSpeed is not installed; pip install -e '.[deepspeed]', or engine=fsdp")
    if device.type == DeviceKind.cpu.value:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
        from deepspeed.utils import logger
    except Exception as error:  # it looks for compilers and drivers while it is imported
        raise ValueError(f"engine=deepspeed: DeepSpeed cannot be imported ({error}); use engine=fsdp") from error
    logger.setLevel(logging.WARNING)
    if device.type == DeviceKind.cpu.value:
        # Otherwise it would build a C++ extension for collectives in shared memory; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
