import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_train.checkpoint.pieces import Piece
from mamba_train.composition import compose_config
from mamba_train.config import ModelConfig
from mamba_train.model.initialise import draw
from mamba_train.model.language_model import MambaLM, resolve_model_config
from mamba_train.parallel import state
from mamba_train.ranks import join

MODEL = resolve_model_config(ModelConfig(name="test", n_layer=6, d_model=32, d_state=4), tokenizer_vocab_size=67)


def empty_pieces() -> dict[str, Piece]:
    model = MambaLM(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return {name: Piece.whole(parameter) for name, parameter in model.named_parameters()}


def test_no_more_is_drawn_at_once_than_the_largest_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, live, most, together = threading.Lock(), 0, 0, 0
    monkeypatch.setattr(state, "LEAST_IN_A_THREAD", 300)

    def watched(name: str, shape: torch.Size, *rest: Any) -> Tensor:
        nonlocal live, most, together
        with lock:
            live += shape.numel()
            most = max(most, live)
            together = max(together, int(live > shape.numel()))
        time.sleep(0.005)
        value = draw(name, shape, *rest)
        with lock:
            live -= shape.numel()
        return value

    monkeypatch.setattr(state, "draw", watched)
    monkeypatch.setattr(state.os, "cpu_count", lambda: 4)
    pieces = empty_pieces()
    state.draw_pieces(pieces, MODEL, seed=3)
    assert most == max(piece.values.numel() for piece in pieces.values())
    assert together, "one after the other"
    for name, piece in pieces.items():
        assert torch.equal(piece.values, draw(name, torch.Size(piece.shape), MODEL, 3).view(-1)), name


@pytest.mark.parametrize("size", ["mamba_tiny", "mamba_1.4b", "mamba_2.8b", "mamba2_tiny", "mamba2_2.7b"])
def test_logarithms_are_not_drawn_in_threads(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several threads whose first logarithm it is get one of few digits from MKL, once in some hundred processes."""
    config = resolve_model_config(compose_config([f"model={size}", "model.n_layer=1"]).model, 50277)
    with torch.device("meta"):
        model = MambaLM(config)
    pieces = {name: Piece.whole(parameter.data) for name, parameter in model.named_parameters()}
    here: dict[str, bool] = {}

    def watched(name: str, shape: torch.Size, *rest: Any) -> Tensor:
        here[name] = threading.current_thread() is threading.main_thread()
        return torch.empty(shape, device="meta")

    monkeypatch.setattr(state, "draw", watched)
    state.draw_pieces(pieces, config, seed=0)
    assert here.keys() == pieces.keys()
    assert all(alone for name, alone in here.items() if name.endswith(("A_log", "dt_bias")))
    assert not here["embedding.weight"]


def test_what_a_thread_raises_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise MemoryError("no room for a parameter")

    monkeypatch.setattr(state, "draw", refuse)
    monkeypatch.setattr(state, "LEAST_IN_A_THREAD", 1)
    with pytest.raises(MemoryError, match="no room"):
        state.draw_pieces(empty_pieces(), MODEL, seed=0)


def test_norms_of_layers_are_known_where_their_squares_leave_fp32() -> None:
    """As those of a step that is skipped for its gradient: the ledger names its largest layers."""
    gradients = {"layers.3.mixer.ssm.D": torch.tensor([3e25, 0.0]), "layers.3.norm.weight": torch.tensor([4e25])}
    found = state.norms_by_layer({**gradients, "norm.weight": torch.tensor([1e-25])}, join())
    assert found == {"layer_03": pytest.approx(5e25), "norm": pytest.approx(1e-25)}
