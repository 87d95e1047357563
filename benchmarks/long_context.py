"""What the length of a sequence costs: Mamba-1, Mamba-2 and a Transformer++ from 2,048 to 131,072 tokens.

    python -m benchmarks.long_context [--parts operators training] [--models ...] [--operators ...] [--lengths ...]
        [--results FILE.jsonl]
    python -m benchmarks.long_context --parts --results FILE.jsonl --plot FILE.png

training: whole training steps on one GPU, the same number of tokens in each (a sequence at least), by the engine that
train.py takes: forward, loss, backward, clipping, fused AdamW; bf16 autocast over fp32 weights. engine.recompute is
what "auto" makes of the sizes, which is printed.
operators: scan, SSD and causal attention as layers of the same d_model have them, one sequence: forward alone, and
forward with backward, from CUDA graphs.
Attention is PyTorch's scaled_dot_product_attention: the faster of cuDNN and flash among the operators, cuDNN in the
steps.
Lines of --results add up over calls, so that the sweep can be run in slices; --plot draws all that are there, with the
number of tokens from which on attention takes longer.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import selective_scan as scan_benchmark
from benchmarks import ssd as ssd_benchmark
from benchmarks.selective_scan import ask_device, graph_time
from benchmarks.step_models import VOCABULARY, Step, engine_config, model_config, ours
from kernels.selective_scan import selective_scan
from mamba_train.config import Recompute

MODELS = ["mamba_130m", "mamba2_130m", "transformerpp_130m"]
LENGTHS = [2**n for n in range(11, 18)]
STEP_TOKENS, LEAST_STEPS, STEPS, WARM_UP = 32768, 2, 5, 3
ATTENTION = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FASTEST = "fastest attention"  # PyTorch's, at each length
HEAD_DIM = 128  # of attention; 64 of the 130m model, where it is a part of the whole step

Record = dict[str, str | int | float]


def training_rates(models: list[str], lengths: list[int]) -> Iterator[Record]:
    for length in lengths:
        for model in models:
            yield {"part": "training", "model": model, "length": length} | rate(model, length)


def rate(model: str, length: int) -> Record:
    config, rows = model_config(model), max(1, STEP_TOKENS // length)
    for policy in (Recompute.auto, Recompute.layer):
        settings = engine_config(config, policy, None, rows, length)
        label = f"{settings.recompute} {settings.recompute_layers or ''}".strip()
        try:
            with sdpa_kernel([ATTENTION["cuDNN"], ATTENTION["flash"]], set_priority=True):
                return steps_of(ours(config, settings), rows, length) | {"recompute": label}
        except torch.OutOfMemoryError:
            pass
        finally:
            gc.collect()
            torch.cuda.empty_cache()
    return {"tokens_per_second": 0.0, "gib": 0.0, "recompute": "out of memory"}


def steps_of(step: Step, rows: int, length: int) -> Record:
    torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    while len(seconds) < WARM_UP + LEAST_STEPS or (len(seconds) < WARM_UP + STEPS and sum(seconds[WARM_UP:]) < 1):
        batch = torch.randint(0, VOCABULARY, (rows, length + 1)).pin_memory()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step([batch])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    timed = seconds[WARM_UP:]
    slowest, median, fastest = (rows * length / s for s in (max(timed), statistics.median(timed), min(timed)))
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"tokens_per_second": median, "slowest": slowest, "fastest": fastest, "gib": peak, "rows": rows}


def operator_times(operators: list[str], d_model: int, lengths: list[int]) -> Iterator[Record]:
    for length in lengths:
        for name in operators:
            forward, both = OPERATORS[name](d_model, length)
            times = [graph_time(call, replays=3) for call in (forward, both)]
            yield {
                **{"part": "operators", "operator": name, "d_model": d_model, "length": length},
                **{"forward_ms": times[0].median, "both_ms": times[1].median},
                **{"forward_spread_ms": times[0].spread, "both_spread_ms": times[1].spread},
            }
            del forward, both
            torch.cuda.empty_cache()


Calls = tuple[Callable[[], object], Callable[[], object]]


def scan_calls(d_model: int, length: int) -> Calls:
    inputs = scan_benchmark.make_inputs(1, length, 2 * d_model, 16)
    return scan_benchmark.calls(selective_scan, list(inputs.values()))


def ssd_calls(d_model: int, length: int) -> Calls:
    inputs = ssd_benchmark.make_inputs(1, length, 2 * d_model)
    return scan_benchmark.calls(ssd_benchmark.ours, [inputs[name] for name in ssd_benchmark.NAMES])


def attention_calls(backend: SDPBackend, d_model: int, length: int) -> Calls:
    shape = (1, length, d_model // HEAD_DIM, HEAD_DIM)  # as a projection leaves them
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return scan_benchmark.calls(attend, [q, k, v])


OPERATORS: dict[str, Callable[[int, int], Calls]] = {
    "scan": scan_calls,
    "SSD": ssd_calls,
    **{
        f"attention, {name}": lambda d_model, length, backend=backend: attention_calls(backend, d_model, length)
        for name, backend in ATTENTION.items()
    },
}


def crossover(ours: dict[int, float], attention: dict[int, float]) -> float | None:
    """From which length on attention takes longer: between two of the lengths, logarithms interpolated; 0: from all."""
    lengths = sorted(length for length in ours if ours[length] > 0 and attention.get(length, 0) > 0)
    ratios = [math.log(attention[length] / ours[length]) for length in lengths]
    if not ratios or ratios[-1] <= 0:
        return None
    last = max((i for i, ratio in enumerate(ratios) if ratio <= 0), default=None)
    if last is None:
        return 0.0
    share = ratios[last] / (ratios[last] - ratios[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def table(records: list[Record], part: str, row: str, value: str) -> dict[str, dict[int, float]]:
    """Values by name and length; of the same measured again, the last."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record["part"] == part:
            found.setdefault(str(record[row]), {})[int(record["length"])] = float(record[value])
    return found


@dataclass
class Panel:
    """One figure by length: of scan and SSD, or of models with them, and of attention, which they are compared with."""

    title: str
    curves: dict[str, dict[int, float]]
    attention: str = ""
    digits: int = 3
    is_time: bool = True

    def crossovers(self) -> dict[str, float | None]:
        """By curve, from how many tokens on attention takes longer."""
        if self.attention not in self.curves:
            return {}
        power = 1 if self.is_time else -1  # of a rate: what a token takes
        costs = {
            name: {length: value**power for length, value in values.items() if value > 0}
            for name, values in self.curves.items()
        }
        others = (name for name in costs if not name.startswith("attention") and name != self.attention)
        return {name: crossover(costs[name], costs[self.attention]) for name in others}


def panels(records: list[Record]) -> list[Panel]:
    forward, both = (
        with_fastest(table(records, "operators", "operator", f"{value}_ms")) for value in ("forward", "both")
    )
    rates = table(records, "training", "model", "tokens_per_second")
    found = [
        Panel("one operator, forward, ms", forward, FASTEST),
        Panel("one operator, forward + backward, ms", both, FASTEST),
        Panel("training steps, tokens/s", rates, "transformerpp_130m", digits=0, is_time=False),
        Panel("training steps, peak in GiB", table(records, "training", "model", "gib"), digits=1, is_time=False),
    ]
    return [panel for panel in found if any(panel.curves.values())]


def with_fastest(times: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Adds the fastest attention at each length."""
    kinds = [value for name, value in times.items() if name.startswith("attention")]
    lengths = sorted({length for kind in kinds for length in kind})
    return times | ({FASTEST: {n: min(kind[n] for kind in kinds if n in kind) for n in lengths}} if kinds else {})


def report(records: list[Record]) -> None:
    """All values as tables, and from which length on attention takes longer than the others."""
    for panel in panels(records):
        lengths = sorted({length for values in panel.curves.values() for length in values})
        print(f"\n| {panel.title} | {' | '.join(f'{length:,}' for length in lengths)} |\n|---|{'---|' * len(lengths)}")
        for name, values in panel.curves.items():
            cells = (f"{values[length]:,.{panel.digits}f}" if length in values else "" for length in lengths)
            print(f"| {name} | {' | '.join(cells)} |")
        for name, tokens in panel.crossovers().items():
            where = {None: "at no length", 0.0: "at all lengths"}.get(tokens, f"from {tokens or 0:,.0f} tokens on")
            print(f"{panel.attention} takes longer than {name} {where}")


def draw(records: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = panels(records)
    columns = min(2, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 4.2 * rows), squeeze=False)
    for axis, panel in zip(axes.flat, drawn, strict=False):
        found = panel.crossovers()
        for name, values in panel.curves.items():
            lengths = sorted(length for length, value in values.items() if value > 0)
            style = {"linestyle": ":"} if name.startswith("attention") else {"marker": "o"}
            label = name
            if found.get(name):
                label += f" (faster from {found[name]:,.0f} tokens on)"
            axis.plot(lengths, [values[length] for length in lengths], markersize=3, label=label, **style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(LENGTHS, [f"{length // 1024}k" for length in LENGTHS])
        axis.set_xlabel("tokens in a sequence")
        axis.set_title(panel.title, fontsize=10)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        if panel.is_time:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    for axis in axes.flat[len(drawn) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=["operators", "training"], choices=["operators", "training"])
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--operators", nargs="*", default=list(OPERATORS), choices=list(OPERATORS))
    parser.add_argument("--d-model", type=int, default=2560, help="of the operators")
    parser.add_argument("--results", type=Path, help="JSON lines to read, and to add to")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    records: list[Record] = []
    if options.results and options.results.exists():
        records = [json.loads(line) for line in options.results.read_text().splitlines()]
    if options.parts:
        print(f"{ask_device('name,driver_version')}, torch {torch.__version__}")
    parts = {
        "operators": lambda: operator_times(options.operators, options.d_model, options.lengths),
        "training": lambda: training_rates(options.models, options.lengths),
    }
    for part in options.parts:
        for record in parts[part]():
            print(" ".join(f"{k} {v:,.3f}" if isinstance(v, float) else f"{v}" for k, v in record.items()), flush=True)
            records.append(record)
            if options.results:
                with options.results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
    report(records)
    if options.plot:
        draw(records, options.plot)


if __name__ == "__main__":
    main()
