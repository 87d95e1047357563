"""A batch of texts being continued: prompts by the parallel form, then one token after the other by recurrence."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.checks import narrowed
from mamba_train.config import MixerKind, layer_mixers
from mamba_train.inference.fused_step import can_fuse, fused_step
from mamba_train.model.attention import KVState
from mamba_train.model.language_model import MambaLM
from mamba_train.model.mixers import LayerState
from mamba_train.model.selective_ssm import SSMState

WARM_UP_STEPS = 2  # kernels are compiled at their first call, which a graph must not contain


class Decoder:
    """Holds the state of each text; for models without attention its size does not depend on their lengths.

    Attributes: `logits` of what comes next; `replays`, whether steps are a CUDA graph.

    cuda_graph: replay the step as a CUDA graph instead of launching its kernels one by one, which at small batches
    takes longer than computing them; None: wherever that is possible. state_dtype: in which the state of the scans is
    kept between two tokens, where it is rounded; None: fp16, or fp32 where the weights are. At large batches the state
    is much of the memory traffic; fp16 rounds it eight times finer than bf16 and ends at 65,504, where it stays.
    """

    def __init__(
        self,
        model: MambaLM,
        prompts: Sequence[Sequence[int]],
        cuda_graph: bool | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        """Read the prompts, which may differ in length. Raises ValueError for one without tokens."""
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {number} has no tokens; give at least one")
        weight = model.embedding.weight
        # What an attention layer remembers grows, and a graph replays the same shapes at the same addresses.
        can_replay = weight.is_cuda and MixerKind.attention not in layer_mixers(model.config)
        if cuda_graph and not can_replay:
            raise ValueError("cuda_graph=True: needs a model without attention layers on a CUDA device")
        self._model = model
        self.replays = can_replay if cuda_graph is None else cuda_graph
        self._step: _GraphedStep | None = None
        tokens, seq_idx = _pad_left(prompts, weight.device)
        self.logits, state = model.prefill(tokens, model.initial_state(len(prompts), weight.dtype), seq_idx)
        kept = state_dtype or (torch.float32 if weight.dtype == torch.float32 else torch.float16)
        self._state = [
            SSMState(layer.conv, narrowed(layer.scan, kept)) if isinstance(layer, SSMState) else layer
            for layer in state
        ]

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each text, int64 (rows,); return what comes next as logits (rows, padded vocabulary).

        A negative one, which stands for none, is taken as 0. The logits are overwritten by the next call.
        """
        if self.replays:
            if self._step is None:
                self._step = _GraphedStep(self._model, self._state)
            self.logits = self._step(tokens)
        else:
            self.logits, self._state = _step(self._model, tokens.clamp(min=0), self._state)
        return self.logits


def _step(model: MambaLM, tokens: Tensor, state: list[LayerState]) -> tuple[Tensor, list[LayerState]]:
    if can_fuse(model, len(tokens)):
        return fused_step(model, tokens, state), state
    return model.step(tokens, state, in_place=True)


class _GraphedStep:
    """The step of a model as one CUDA graph, which reads and writes the state where it lies."""

    def __init__(self, model: MambaLM, state: list[LayerState]) -> None:
        self._token = torch.zeros(_batch_size(state), dtype=torch.int64, device=model.embedding.weight.device)
        scratch = [_zeros_like(layer) for layer in state]
        self._replay = record(
            lambda: _step(model, self._token, state)[0],
            warm_up=lambda: _step(model, self._token, scratch),
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        torch.clamp(tokens, min=0, out=self._token)
        return self._replay()


def record(function: Callable[[], Tensor], warm_up: Callable[[], object]) -> Callable[[], Tensor]:
    """`function` as a CUDA graph, which does the same once more with the same tensors at each call.

    What it returns is overwritten by the next call. warm_up: called before, to compile what `function` launches.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_STEPS):
            warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _zeros_like(state: LayerState) -> LayerState:
    assert isinstance(state, SSMState), "Decoder replays no model with attention"
    return SSMState(torch.zeros_like(state.conv), torch.zeros_like(state.scan))


def _batch_size(state: list[LayerState]) -> int:
    first = state[0]
    return len(first.keys) if isinstance(first, KVState) else len(first.scan)


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Tokens (rows, longest), and the documents that keep a prompt apart from its padding; None where there is none."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    seq_idx = torch.zeros(len(prompts), longest, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.int64)
        seq_idx[row, longest - len(prompt) :] = 1
    is_ragged = any(len(prompt) < longest for prompt in prompts)
    return tokens.to(device), seq_idx.to(device) if is_ragged else None
