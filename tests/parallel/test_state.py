import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_train.checkpoint.pieces import Piece
from mamba_train.config import ModelConfig
from mamba_train.model.initialise import draw
from mamba_train.model.language_model import MambaLM, resolve_model_config
from mamba_train.parallel import state

MODEL = resolve_model_config(ModelConfig(name="test", n_layer=6, d_model=32, d_state=4), tokenizer_vocab_size=67)


def empty_pieces() -> dict[str, Piece]:
    model = MambaLM(MODEL)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return {name: Piece.whole(parameter) for name, parameter in model.named_parameters()}


def test_no_more_is_drawn_at_once_than_the_largest_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, live, most, together = threading.Lock(), 0, 0, 0

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


def test_what_a_thread_raises_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise MemoryError("no room for a parameter")

    monkeypatch.setattr(state, "draw", refuse)
    with pytest.raises(MemoryError, match="no room"):
        state.draw_pieces(empty_pieces(), MODEL, seed=0)
