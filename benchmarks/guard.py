"""What the numerical guard costs: a step of a model with it, beside the same step with a plain test for NaN.

    python benchmarks/guard.py model=mamba_130m --batch 8 --length 2048 --pairs 150

Two kinds of steps of one engine, in turns, as train.py makes them (on one GPU from a CUDA graph): `plain` asks the
engine's own judge (a gradient that is not finite is skipped) and reads the loss after the update, `guard` judges loss
and norm against a full window before the update. Prints the median step and its quartiles of each; the difference
within pairs of neighbours, its mean with the standard error, a tenth of the pairs left out at either end; the time that
the host spends on judging; and how often a step waits for the device (on CUDA, as torch's sync debug mode counts).
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable

import torch

from mamba_train.composition import compose_config
from mamba_train.config import GuardConfig
from mamba_train.model.language_model import resolve_model_config
from mamba_train.parallel.build import build_engine
from mamba_train.parallel.engine import Engine
from mamba_train.ranks import join
from mamba_train.training.guard import Decision, Guard, GuardState

VOCAB_SIZE = 50277


def full_window(config: GuardConfig) -> GuardState:
    """As after many steps, wide enough for the random tokens of this benchmark."""
    generator = torch.Generator().manual_seed(0)
    losses = (11 + torch.randn(config.window_steps, generator=generator)).tolist()
    norms = torch.randn(config.window_steps, generator=generator).exp().tolist()
    return GuardState(losses=losses, grad_norms=norms)


def backward(engine: Engine, tokens: torch.Tensor) -> torch.Tensor:
    n_targets = torch.tensor(tokens[:, 1:].numel(), device=engine.device)
    loss = torch.zeros((), device=engine.device)
    for batch in engine.micro_batches([tokens]):
        loss += engine.accumulate(batch[:, :-1], batch[:, 1:], None, n_targets)
    return loss


def plain_step(engine: Engine, tokens: torch.Tensor) -> None:
    loss = backward(engine, tokens)
    engine.step(1e-5)
    engine.sum_over_ranks(torch.stack([loss, loss.new_tensor(0.0)])).tolist()


def guarded_step(engine: Engine, tokens: torch.Tensor, guard: Guard) -> None:
    decision = Decision(engine, guard, backward(engine, tokens), wants_stop=False)
    engine.step(1e-5, decision)
    guard.note(decision.loss, decision.grad_norm, decision.cause)


def count_waits(step: Callable[[], None], device: torch.device) -> int | None:
    """How often one step makes the host wait for the device; None where torch cannot say."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def host_seconds(guard: Guard) -> float:
    """Of judging one step and of taking it in."""
    times = []
    for number in range(500):
        begin = time.perf_counter()
        loss = 11.0 + number % 7 / 10
        cause = guard.judge(loss, 1.0)
        guard.note(loss, 1.0, cause)
        times.append(time.perf_counter() - begin)
        assert cause is None
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=40, help="of a step of either kind")
    parser.add_argument("--warm-up", type=int, default=5, help="pairs that are not counted")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = compose_config([*args.overrides, "run_dir=unused"])
    model_config = resolve_model_config(config.model, VOCAB_SIZE)
    engine = build_engine(config.engine, join())
    engine.prepare(model_config, config.optim, seed=0)
    tokens = torch.randint(0, VOCAB_SIZE, (args.batch, args.length + 1)).to(engine.device)
    guard = Guard(config.guard, config.optim.max_grad_norm, full_window(config.guard))
    loops: dict[str, Callable[[], None]] = {
        "plain": lambda: plain_step(engine, tokens),
        "guard": lambda: guarded_step(engine, tokens, guard),
    }
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(-args.warm_up, args.pairs):
        # Each goes first as often as the other.
        for name, step in list(loops.items())[:: 1 if number % 2 else -1]:
            begin = time.perf_counter()
            step()
            if engine.device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                times[name].append(1e3 * (time.perf_counter() - begin))
    print(f"{config.model.name}, {args.batch} x {args.length} tokens, {engine.device}, torch {torch.__version__}")
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        waits = count_waits(loops[name], engine.device)
        print(f"{name}: {median:.3f} ms (quartiles {low:.3f} to {high:.3f}), waits: {waits}")
    # Of neighbours in time, so that a clock that changes under both cancels out.
    differences = sorted(with_it - without for without, with_it in zip(times["plain"], times["guard"], strict=True))
    middle = differences[len(differences) // 10 : len(differences) - len(differences) // 10]
    mean, error = statistics.mean(middle), statistics.stdev(middle) / math.sqrt(len(middle))
    whole = statistics.median(times["plain"])
    print(
        f"difference within {len(middle)} of {len(differences)} pairs: {mean:+.3f} +- {error:.3f} ms "
        f"({100 * mean / whole:+.2f} +- {100 * error / whole:.2f}% of a step), median "
        f"{statistics.median(differences):+.3f} ms"
    )
    seconds = host_seconds(Guard(config.guard, config.optim.max_grad_norm, full_window(config.guard)))
    print(f"host, judging and taking in: {1e6 * seconds:.0f} us ({1e5 * seconds / whole:.3f}% of a step)")


if __name__ == "__main__":
    main()
