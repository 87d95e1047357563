"""Our model and `mamba_ssm`'s trained alike: the same data, initial weights and hyper-parameters; their curves.

    python -m benchmarks.same_curve [--steps 1000] [--jobs 3] [--plot FILE.png] data=stdlib [KEY=VALUE ...]

Overrides are those of train.py: any prepared folder (`data=shards data.path=...`), text files (`data=local`) or the
sources of the standard library. Trains ours once and the peer twice; two runs of the peer differ because its backward
adds in an order that is not fixed. The peer's passes are replayed as a CUDA graph, without which it takes minutes.
--jobs 3: all at once, and speeds that mean nothing. Prints the mean of the last 100 losses of each, and how far the
curves lie apart (root mean square of the difference of means of 25 losses). What the runs have is written after every
100 steps, so that a benchmark cut short still says something (--report).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.mixer import PEER_NAMES
from benchmarks.step_models import Batches, peer_model, peer_step
from mamba_train.composition import compose_config
from mamba_train.config import Config, ModelConfig
from mamba_train.data.batches import BatchSource, WindowForm
from mamba_train.data.opening import open_data
from mamba_train.model.initialise import draw
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.native import NativeEngine
from mamba_train.ranks import join
from mamba_train.training.schedule import learning_rate

RUNS = ["ours", "mamba_ssm", "mamba_ssm again"]
LAST, WINDOW, WRITTEN = 100, 25, 100
OPTIONS = ["model=mamba_130m", "data.sequence_length=512", "training.global_batch_size=8", "optim.lr=6e-4"]

TrainStep = Callable[[Batches, float], Tensor]  # of micro-batches and a learning rate; the mean loss


def composed(overrides: list[str], steps: int) -> Config:
    return compose_config([*OPTIONS, "run_dir=unused", f"training.total_steps={steps}", *overrides])


def batches(config: Config) -> Iterator[Batches]:
    data = open_data(config.data, lambda text: None)
    rows, form = config.training.global_batch_size, WindowForm(config.data.sequence_length, with_boundaries=False)
    source = BatchSource(data.corpora, rows, config.seed, form, data.stages)
    for step in itertools.count():
        yield [source.batch(step * rows, slice(None)).tokens.pin_memory()]


def ours(config: Config, model: ModelConfig) -> TrainStep:
    engine = NativeEngine(config.engine, join())
    engine.prepare(model, config.optim, config.seed)

    def step(data: Batches, lr: float) -> Tensor:
        loss = torch.zeros((), device=engine.device)
        n_targets = torch.tensor(float(sum(batch[:, 1:].numel() for batch in data)), device=engine.device)
        for batch in engine.micro_batches(data):
            tokens = batch.to(engine.device, non_blocking=True)
            loss += engine.accumulate(tokens[:, :-1], tokens[:, 1:], None, n_targets)
        engine.step(lr)
        return loss

    return step


def peer(config: Config, model: ModelConfig) -> TrainStep:
    theirs = peer_model(model)
    load_initial_weights(theirs, model, config.seed)
    return peer_step(theirs, config.optim, graphs=True)


@torch.no_grad()
def load_initial_weights(theirs: nn.Module, model: ModelConfig, seed: int) -> None:
    """Those that ours begins with."""
    names = {"embedding.weight": "backbone.embedding.weight", "norm.weight": "backbone.norm_f.weight"}
    for layer in range(model.n_layer):
        names[f"layers.{layer}.norm.weight"] = f"backbone.layers.{layer}.norm.weight"
        for mine, other in PEER_NAMES.items():
            names[f"layers.{layer}.mixer.{mine}"] = f"backbone.layers.{layer}.mixer.{other}"
    parameters = dict(theirs.named_parameters())
    assert sorted(names.values()) == sorted(parameters), "the peer has other parameters"
    for mine, other in names.items():
        shape = parameters[other].squeeze(1).shape if other.endswith("conv1d.weight") else parameters[other].shape
        parameters[other].copy_(draw(mine, shape, model, seed).view_as(parameters[other]))


def train(name: str, folder: Path, config: Config) -> None:
    vocabulary = open_data(config.data, print).vocab_size
    model = resolve_model_config(config.model, vocabulary)
    step = (ours if name == "ours" else peer)(config, model)
    losses: list[Tensor] = []
    for number, data in enumerate(batches(config), start=1):
        lr = learning_rate(number, config.optim.lr, config.schedule, config.training.total_steps)
        losses.append(step(data, lr))
        if number % WRITTEN == 0 or number == config.training.total_steps:
            (folder / f"{name}.json").write_text(json.dumps(torch.stack(losses).tolist()))
        if number == config.training.total_steps:
            return


def report(folder: Path, plot: Path | None) -> None:
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in RUNS}
    n_steps = min(len(losses) for losses in found.values())
    curves = {name: losses[:n_steps] for name, losses in found.items()}
    means = {name: statistics.mean(losses[-LAST:]) for name, losses in curves.items()}
    print(f"mean loss of steps {n_steps - LAST + 1} to {n_steps}")
    for name, mean in means.items():
        print(f"  {name:16s} {mean:.5f}   (step 1: {curves[name][0]:.5f})")
    one, other = means["mamba_ssm"], means["mamba_ssm again"]
    print(f"ours from the mean of the peer's: {means['ours'] - (one + other) / 2:+.5f}, from each ", end="")
    print(f"{means['ours'] - one:+.5f} and {means['ours'] - other:+.5f}; the peer's from each other {other - one:+.5f}")
    print(f"root mean square of differences of means of {WINDOW} losses")
    for a, b in itertools.combinations(RUNS, 2):
        differences = [x - y for x, y in zip(curves[a], curves[b], strict=True)]
        parts = [differences[first : first + WINDOW] for first in range(0, n_steps - WINDOW + 1, WINDOW)]
        squares = [statistics.mean(part) ** 2 for part in parts]
        print(f"  {a} - {b}: {statistics.mean(squares) ** 0.5:.5f}")
    if plot is not None:
        draw_curves(curves, plot)


def draw_curves(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[2, 1])
    reference = curves["mamba_ssm"]
    for name, losses in curves.items():
        steps = range(1, len(losses) + 1)
        above.plot(steps, losses, label=name, linewidth=1)
        below.plot(steps, [a - b for a, b in zip(losses, reference, strict=True)], linewidth=1)
    above.set_ylabel("loss (nats per token)")
    above.legend()
    below.set_ylabel("loss minus that of mamba_ssm")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/same_curve"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--run", choices=RUNS, help="only this one; nothing is compared")
    parser.add_argument("--report", action="store_true", help="only compare what is in --out")
    args, overrides = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = composed(overrides, args.steps)
    if args.run:
        return train(args.run, args.out, config)
    if not args.report:
        open_data(config.data, print)  # prepared once, before the runs look for it
        command = [sys.executable, "-m", "benchmarks.same_curve", f"--steps={args.steps}", f"--out={args.out}"]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda name: subprocess.run([*command, "--run", name, *overrides], check=True), RUNS))
    report(args.out, args.plot)


if __name__ == "__main__":
    main()
