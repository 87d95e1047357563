"""Initial values and whole tensors of what the ranks of an engine hold, whatever cuts it."""

import math
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from mamba_train.checkpoint.pieces import Piece
from mamba_train.config import ModelConfig
from mamba_train.model.initialise import draw
from mamba_train.parallel.engine import Engine
from mamba_train.ranks import Ranks

DRAWING_THREADS = 8
# Elements of a parameter that is worth a thread. Smaller ones are drawn before, one by one: they take no time, and
# logarithms are among them. Several threads whose first logarithm it is get one of few digits from MKL now and then
# (log 3 = 1.09858).
LEAST_IN_A_THREAD = 2**20


def draw_pieces(pieces: Mapping[str, Piece], config: ModelConfig, seed: int) -> None:
    """Fill parts of parameters with their initial values: each parameter is drawn whole, then cut.

    Several large ones at once, as one thread draws a billion numbers in some ten seconds; but no more of them than are
    as large as the largest one. So no rank ever holds more than its part and what one whole parameter needs (contract
    C2).
    """
    sizes = {name: math.prod(piece.shape) for name, piece in pieces.items()}
    free = max(sizes.values())
    changed = threading.Condition()

    @torch.no_grad()  # a thread has a mode of its own
    def fill(name: str) -> None:
        nonlocal free
        with changed:
            changed.wait_for(lambda: free >= sizes[name])
            free -= sizes[name]
        try:
            piece = pieces[name]
            piece.values.copy_(piece.of(draw(name, torch.Size(piece.shape), config, seed)))
        finally:
            with changed:
                free += sizes[name]
                changed.notify_all()

    for name in pieces:
        if sizes[name] < LEAST_IN_A_THREAD:
            fill(name)
    with ThreadPoolExecutor(min(DRAWING_THREADS, os.cpu_count() or 1)) as threads:
        list(threads.map(fill, [name for name in pieces if sizes[name] >= LEAST_IN_A_THREAD]))


def check_drawable(model: nn.Module) -> None:
    """Raise RuntimeError when a model has a buffer: no rule would fill it."""
    for name, _ in model.named_buffers():
        raise RuntimeError(f"buffer {name} has no initialisation rule")


@torch.no_grad()
def norms_by_layer(gradients: Mapping[str, Tensor], ranks: Ranks, replicas: int = 1) -> dict[str, float]:
    """Norm of each layer's gradient, and of each parameter outside the layers, from the part that each rank has.

    gradients: by parameter name. replicas: how many ranks have the same part. All ranks have the same parts of the
    model in the same order, some of them empty.
    """
    parts = {name: part_of(name) for name in gradients}
    order = {part: number for number, part in enumerate(dict.fromkeys(parts.values()))}
    device = next(iter(gradients.values())).device
    squares = torch.zeros(len(order), dtype=torch.float64, device=device)
    for name, gradient in gradients.items():
        squares[order[parts[name]]] += gradient.double().square().sum()
    values = (ranks.sum(squares) / replicas).sqrt().tolist()
    return dict(zip(order, values, strict=True))


def part_of(name: str) -> str:
    """`layers.7.mixer.ssm.D` is of `layer_07`, `embedding.weight` of `embedding`."""
    first, *rest = name.split(".")
    return f"layer_{int(rest[0]):02d}" if first == "layers" else first


def load_weights(engine: Engine, weights: Mapping[str, Tensor]) -> None:
    """Put whole weights, which each rank has, into an engine; raises KeyError for a missing parameter."""
    for name, piece in engine.pieces().model.items():
        piece.values.copy_(piece.of(weights[name]))
    engine.pieces_changed()


@torch.no_grad()
def whole(piece: Piece, ranks: Ranks) -> Tensor:
    """The whole tensor of which each rank has a piece, on the device of the pieces, on every rank."""
    tensor = piece.values.new_zeros(piece.shape)
    if piece.saved_here:
        piece.of(tensor).copy_(piece.values)
    # Every element comes from the one rank that saves it: the sum adds zeros only.
    return ranks.sum(tensor)


def whole_state(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All weights and all optimiser state, copied to the CPU of every rank: for small models."""
    pieces = engine.pieces()
    model, optimizer = (
        {name: whole(piece, engine.ranks).to("cpu", copy=True) for name, piece in part.items()}
        for part in (pieces.model, pieces.optimizer)
    )
    return model, optimizer
