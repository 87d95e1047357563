"""Our model and `mamba_ssm`'s trained alike: the same data, initial weights and hyper-parameters; their curves.

    python -m benchmarks.same_curve [--steps 1000] [--ours 3] [--peers 4] [--jobs 7] [--plot FILE.png] data=stdlib
                                    [KEY=VALUE ...]

Overrides are those of train.py: any prepared folder (`data=shards data.path=...`), text files (`data=local`) or the
sources of the standard library. Two runs of the peer differ because its backward adds in an order that is not fixed.
Ours would not differ: its run k has a learning rate k millionths higher, which moves roundings and nothing else. The
peer's passes are replayed as a CUDA graph, without which it takes minutes. --jobs 7: all at once, and speeds that mean
nothing. Prints the mean of the last 100 losses of each run, the difference of the two kinds with its standard error,
and what two runs of the peer differ by. What the runs have is written after every 100 steps, so that a benchmark cut
short still says something (--report).
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

KINDS = ["ours", "mamba_ssm"]
LAST, WINDOW, WRITTEN = 100, 25, 100
OPTIONS = ["model=mamba_130m", "data.sequence_length=256", "training.global_batch_size=8", "optim.lr=6e-4"]

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
    kind, number = name.split("-")
    step = (ours if kind == "ours" else peer)(config, model)
    peak_lr = config.optim.lr * (1 + (1e-6 * int(number) if kind == "ours" else 0.0))
    losses: list[Tensor] = []
    for step_number, data in enumerate(batches(config), start=1):
        lr = learning_rate(step_number, peak_lr, config.schedule, config.training.total_steps)
        losses.append(step(data, lr))
        if step_number % WRITTEN == 0 or step_number == config.training.total_steps:
            (folder / f"{name}.json").write_text(json.dumps(torch.stack(losses).tolist()))
        if step_number == config.training.total_steps:
            return


def report(folder: Path, plot: Path | None) -> None:
    """The runs up to the last step that all of them have."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*-*.json"))}
    n_steps = min(len(losses) for losses in found.values())
    curves = {name: losses[:n_steps] for name, losses in found.items()}
    means: dict[str, list[float]] = {kind: [] for kind in KINDS}
    print(f"mean loss of steps {n_steps - LAST + 1} to {n_steps}")
    for name, losses in curves.items():
        means[name.split("-")[0]].append(statistics.mean(losses[-LAST:]))
        print(f"  {name:12s} {statistics.mean(losses[-LAST:]):.5f}   (step 1: {losses[0]:.5f})")
    mine, theirs = (means[kind] for kind in KINDS)
    error = sum(statistics.variance(values) / len(values) for values in (mine, theirs)) ** 0.5
    print(
        f"ours from the peer's, of the means of the runs: {difference(mine, theirs):+.5f}, standard error {error:.5f}"
    )
    apart = [abs(a - b) for a, b in itertools.combinations(theirs, 2)]
    print(f"two runs of the peer: {root_mean_square(apart):.5f} (root mean square), {max(apart):.5f} at most")
    print(f"root mean square of differences of means of {WINDOW} losses, over the run and the pairs")
    for kinds in (KINDS[:1] * 2, KINDS[1:] * 2, KINDS):
        pairs = {tuple(sorted((a, b))) for a in curves for b in curves if a != b and sorted(kinds) == kinds_of(a, b)}
        parts = [
            difference(curves[a][i : i + WINDOW], curves[b][i : i + WINDOW]) for a, b in pairs for i in starts(n_steps)
        ]
        print(f"  {' and '.join(kinds)}: {root_mean_square(parts):.5f}")
    if plot is not None:
        draw_curves(curves, plot)


def kinds_of(*runs: str) -> list[str]:
    return sorted(name.split("-")[0] for name in runs)


def starts(n_steps: int) -> range:
    return range(0, n_steps - WINDOW + 1, WINDOW)


def difference(one: list[float], other: list[float]) -> float:
    return statistics.mean(one) - statistics.mean(other)


def root_mean_square(values: list[float]) -> float:
    return statistics.mean(value**2 for value in values) ** 0.5


def draw_curves(curves: dict[str, list[float]], path: Path) -> None:
    """Means of some losses over each other, and below each run's difference from the mean of the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=[2, 1])
    n_steps = len(next(iter(curves.values())))
    steps = [start + WINDOW / 2 for start in starts(n_steps)]
    smooth = {
        name: [statistics.mean(losses[i : i + WINDOW]) for i in starts(n_steps)] for name, losses in curves.items()
    }
    peers = [values for name, values in smooth.items() if name.startswith(KINDS[1])]
    middle = [statistics.mean(values) for values in zip(*peers, strict=True)]
    labelled = set()
    for name, values in smooth.items():
        kind = name.split("-")[0]
        label = None if kind in labelled else f"{kind}, {sum(other.startswith(kind) for other in smooth)} runs"
        labelled.add(kind)
        style = {"color": "tab:blue" if kind == KINDS[0] else "tab:orange", "linewidth": 1, "alpha": 0.8}
        above.plot(steps, values, label=label, **style)
        below.plot(steps, [a - b for a, b in zip(values, middle, strict=True)], **style)
    above.set_ylabel(f"loss, nats per token\n(means of {WINDOW} steps)")
    above.legend()
    below.set_ylabel("minus the mean\nof mamba_ssm's runs")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ours", type=int, default=3, help="runs")
    parser.add_argument("--peers", type=int, default=4, help="runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--out", type=Path, default=Path("runs/same_curve"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--run", metavar="KIND-NUMBER", help="only this one; nothing is compared")
    parser.add_argument("--report", action="store_true", help="only compare what is in --out")
    args, overrides = parser.parse_known_args()
    if min(args.ours, args.peers) < 2:
        parser.error("--ours and --peers: two runs at least, whose difference is what the others are judged by")
    if args.run and args.run.split("-")[0] not in KINDS:
        parser.error(f"--run: {' or '.join(KINDS)} with a number, such as ours-0; got {args.run}")
    args.out.mkdir(parents=True, exist_ok=True)
    config = composed(overrides, args.steps)
    if args.run:
        return train(args.run, args.out, config)
    if not args.report:
        open_data(config.data, print)  # prepared once, before the runs look for it
        names = [f"{kind}-{k}" for kind, n in zip(KINDS, (args.ours, args.peers), strict=True) for k in range(n)]
        command = [sys.executable, "-m", "benchmarks.same_curve", f"--steps={args.steps}", f"--out={args.out}"]
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda name: subprocess.run([*command, "--run", name, *overrides], check=True), names))
    report(args.out, args.plot)


if __name__ == "__main__":
    main()
