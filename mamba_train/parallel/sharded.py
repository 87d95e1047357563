"""FSDP2: weights, gradients and moments are cut over the ranks; HSDP: cut within groups of ranks, replicated between.

A few layers are two units. The norms and the SSMs, which compute with their parameters themselves, are gathered in fp32
(contract C1); the matrices in the dtype of the matrix products. Embedding, last norm and head, which the
whole forward pass holds, are fp32 as well: the gradient of the embedding is a sum over tokens. So the arithmetic is
that of one device under autocast.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from mamba_train.checkpoint.pieces import Piece
from mamba_train.config import EngineConfig, Precision, Recompute
from mamba_train.model.language_model import MambaLM
from mamba_train.parallel.native import NativeEngine
from mamba_train.parallel.optimizer import adamw, local_part
from mamba_train.ranks import Ranks, lone_group

LEAST_UNITS = 8
UNIT_PARAMETERS = 2**27


class ShardedEngine(NativeEngine):
    """`fully_shard` over all ranks, or over `world_size / engine.replicas` of them."""

    casts_once = False  # what is gathered is cast already
    _on_parts: torch.optim.AdamW | None = None

    def __init__(self, config: EngineConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        shards(config, ranks.world_size)
        lone_group()
        self._mesh = _mesh(self.device.type, config.replicas, ranks.world_size)

    def _shard(self, model: MambaLM) -> None:
        reduce_dtype = torch.bfloat16 if self.config.reduce_precision is Precision.bf16 else torch.float32
        # Inputs are never cast: the residual stream is fp32, and autocast does the rest.
        in_fp32 = MixedPrecisionPolicy(torch.float32, reduce_dtype, cast_forward_inputs=False)
        in_compute_dtype = MixedPrecisionPolicy(self.compute_dtype, reduce_dtype, cast_forward_inputs=False)
        reshard = self.config.reshard_after_forward is not False
        blocks = model.blocks()
        largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
        n = layers_per_unit(self.config, len(blocks), largest)
        gathered: list[list[FSDPModule]] = []  # the two of each unit, in the order in which a forward pass needs them
        for unit in (blocks[first : first + n] for first in range(0, len(blocks), n)):
            modules = [named for block in unit for named in block.named_modules()]
            sensitive = [module for name, module in modules if name in ("norm", "mixer.ssm", "mlp_norm")]
            fully_shard(sensitive, mesh=self._mesh, reshard_after_forward=reshard, mp_policy=in_fp32)
            fully_shard([*unit], mesh=self._mesh, reshard_after_forward=reshard, mp_policy=in_compute_dtype)
            gathered.append([unit[0], sensitive[0]])  # type: ignore[list-item]
        fully_shard(model, mesh=self._mesh, mp_policy=in_fp32)
        # Asked for before the layers of a unit are launched, the next one comes in time also where Python is hardly
        # ahead of the GPU; and a rank that is late by less than a unit keeps nobody waiting.
        if not computes_layers_again(self.config):
            for (block, own), following in itertools.pairwise([*gathered, []]):
                block.set_modules_to_forward_prefetch([own, *following])
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Sums, where FSDP2 by itself takes the mean.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _before_micro_batch(self, *, is_last: bool) -> None:
        assert isinstance(self.model, FSDPModule)
        # A graph leaves nothing to the next one but what this rank keeps: its part of the sums.
        alone = self._graphed is not None
        self.model.set_requires_gradient_sync(is_last or self.config.reduce_each_micro_batch or alone)
        self.model.set_is_last_backward(is_last or alone)
        if self.config.reshard_after_forward is False:  # the weights stay for the next micro-batch, too
            self.model.set_reshard_after_backward(is_last or alone)

    def accumulate(self, inputs: Tensor, targets: Tensor, seq_idx: Tensor | None, n_targets: Tensor) -> Tensor:
        if self._graphed is not None:
            self._release()  # a graph gathers for itself, and what an evaluation has gathered is old by the next one
        return super().accumulate(inputs, targets, seq_idx, n_targets)

    def _recorded_in_vain(self) -> None:
        """Have FSDP2 forget a pass that may have been broken off, of which nothing has run.

        What it takes for gathered is not, and no stream may wait for an event of a recording: so torch's own
        `reset_iter_state` (2.13), which waits, does not do.
        """
        assert isinstance(self.model, FSDPModule)
        root = self.model._get_fsdp_state()
        root._comm_ctx.all_gather_state = None
        root._comm_ctx.post_forward_order.clear()
        if hasattr(root._comm_ctx, "reduce_scatter_states"):
            root._comm_ctx.reduce_scatter_states.clear()
            root._comm_ctx._last_post_reduce_events.clear()
        else:  # torch 2.11
            root._comm_ctx.reduce_scatter_state = None  # type: ignore[attr-defined]
        root._state_ctx.iter_forward_root = None
        root._state_ctx.post_backward_final_callback_queued = False
        for state in root._state_ctx.all_states:
            state._modules_to_run_forward.clear()
            state._training_state = TrainingState.IDLE
            group = state._fsdp_param_group
            group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = parameter._unsharded_param.grad = None

    def _update(self) -> None:
        if self._fused_adamw is not None:
            super()._update()
            return
        # The GPU waits for this launch, and operations on some hundred DTensors take Python milliseconds more.
        if self._on_parts is None:  # not before a forward pass: the first one gives uneven parts their place
            self._on_parts = self._optimizer_on_parts()
        parts = (part for group in self._on_parts.param_groups for part in group["params"])
        wholes = (whole for group in self._optimizer.param_groups for whole in group["params"])
        for part, whole in zip(parts, wholes, strict=True):
            part.grad = None if whole.grad is None else local_part(whole.grad)
        self._apply(self._on_parts)
        self._on_parts.zero_grad(set_to_none=True)  # nothing but the parameters holds gradients

    def _optimizer_on_parts(self) -> torch.optim.AdamW:
        """The optimizer once more, for what this rank has of each tensor, in the same memory."""
        parts = {name: nn.Parameter(local_part(whole)) for name, whole in self._parameters.items()}
        optimizer = adamw(parts, self._optim)
        for name, part in parts.items():
            state = self._optimizer.state[self._parameters[name]]
            optimizer.state[part] = {key: local_part(value) for key, value in state.items()}
        return optimizer

    def pieces_changed(self) -> None:
        self._release()

    def _release(self) -> None:
        """Drop what a forward pass has left gathered: the root, and all with engine.reshard_after_forward=false."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _same_gradients(self) -> int:
        return self.config.replicas

    def _piece(self, tensor: Tensor, number: int) -> Piece:
        if not isinstance(tensor, DTensor):  # the step count, which every rank has
            return Piece.whole(tensor, saved_here=self.rank == 0)
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local().detach()
        row = tensor.shape[1:].numel()  # cut along the first dimension: a contiguous range
        return Piece(tuple(tensor.shape), offsets[0] * row, local.view(-1), saved_here=self._is_first_replica())

    def _is_first_replica(self) -> bool:
        return self._mesh.ndim == 1 or self._mesh.get_local_rank("replica") == 0


def shards(config: EngineConfig, world_size: int) -> int:
    """Over how many ranks a model is cut; raises ValueError where they cannot form `engine.replicas` groups."""
    if world_size % config.replicas:
        raise ValueError(
            f"engine.replicas={config.replicas}: expected a divisor of the number of processes ({world_size})"
        )
    return world_size // config.replicas


def layers_per_unit(config: EngineConfig, n_layer: int, layer_parameters: int) -> int:
    """How many layers are gathered together; layer_parameters: of the largest.

    Each unit costs Python some milliseconds in a step, for which the GPU waits when it needs less for the unit's
    layers; but only with several units does one travel while another is computed with.
    """
    if computes_layers_again(config):
        return 1
    return max(1, min(n_layer // LEAST_UNITS, UNIT_PARAMETERS // layer_parameters))


def computes_layers_again(config: EngineConfig) -> bool:
    """Where what a layer does again must not depend on who has gathered its weights: torch counts its operations."""
    return config.recompute in (Recompute.layer, Recompute.keep_scan)


def _mesh(device_type: str, replicas: int, world_size: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, world_size // replicas), mesh_dim_names=("replica", "shard"))
