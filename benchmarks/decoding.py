"""Milliseconds per token of decoding, beside mamba_ssm and transformers, on models of published shapes.

    python -m benchmarks.decoding [MODEL ...]

Weights are random (the time does not depend on them), matrices bf16, sampling greedy, the prompt 64 tokens. One
generation of 322 tokens gives five figures: the time from the second token to number 66, from there to number 130, and
so on, divided by 64. Neither the prompt nor the capture of a graph is in them. Where 64 tokens would take over 0.6
seconds there are two figures, of 16 tokens.
mamba_ssm decodes by the CUDA graph of its `generate(cg=True)` and looks at no token; ours brings each to the CPU, as
whoever shows a text or stops at a string has to. mamba_ssm and transformers keep the state in the dtype of the weights,
bf16; ours is fp16 by default, which takes as many bytes, and bf16 or fp32 in the rows that say so. What is not
installed, or does not run, is left out with a line that says why.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from mamba_train.composition import compose_config
from mamba_train.config import ModelConfig
from mamba_train.convert.model_configs import to_config_json
from mamba_train.convert.names import Layout
from mamba_train.inference.generate import generate
from mamba_train.inference.load import inference_model
from mamba_train.inference.sampling import Sampling
from mamba_train.model.language_model import MambaLM, resolve_model_config

MODELS = ("mamba_130m", "mamba_1.4b", "mamba2_1.3b")
BATCHES = (1, 64)
PROMPT_TOKENS = 64
BEFORE = 2  # tokens that come before the clock starts
FIGURES, TOKENS = 5, 64  # of a generation, and of a figure
SLOW_FIGURES, SLOW_TOKENS, SLOW_SECONDS = 2, 16, 0.6
VOCAB_SIZE = 50277
# Continues prompts (batch, length); for some numbers of new tokens the seconds of the clock when there were so many.
Continue = Callable[[torch.Tensor, Sequence[int]], list[float]]


def ours(config: ModelConfig, device: torch.device, state_dtype: torch.dtype | None = None) -> Continue:
    """Our generation, by CUDA graphs."""
    with torch.device("meta"):
        model = MambaLM(config)
    # Drawn on the device, unlike those of a run: a CPU takes most of a minute for a billion.
    weights = {name: torch.randn(p.shape, device=device) * 0.02 for name, p in model.named_parameters()}
    ready = inference_model(config, weights, device, torch.bfloat16)

    def call(prompts: torch.Tensor, marks: Sequence[int]) -> list[float]:
        stamps: list[float] = []

        def on_token(row: int, token: int) -> bool:
            if row == 0:
                stamps.append(time.perf_counter())
            return False

        generate(
            ready,
            prompts.tolist(),
            Sampling(temperature=0),
            max_new_tokens=marks[-1],
            vocab_size=VOCAB_SIZE,
            on_token=on_token,
            state_dtype=state_dtype,
        )
        return [stamps[mark - 1] for mark in marks]

    return call


def of_mamba_ssm(config: ModelConfig, device: torch.device) -> Continue:
    """The published implementation: the CUDA graph of its `generate(cg=True)`, and the most likely token each time."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
    from mamba_ssm.utils.generation import update_graph_cache

    values = to_config_json(config, Layout.state_spaces, None)
    model = MambaLMHeadModel(MambaConfig(**values), device=device, dtype=torch.bfloat16).eval()
    cache: list[Any] = [None]

    @torch.inference_mode()
    def call(prompts: torch.Tensor, marks: Sequence[int]) -> list[float]:
        # Without the prompt, whose kernels take minutes to tune themselves: a figure is of what comes after it.
        longest = PROMPT_TOKENS + BEFORE + FIGURES * TOKENS
        cache[0] = update_graph_cache(model, cache[0], len(prompts), PROMPT_TOKENS, longest)
        token, texts, stamps = prompts[:, -1:], [], []
        for place in range(PROMPT_TOKENS, PROMPT_TOKENS + marks[-1]):
            position = torch.full((len(prompts), 1), place, dtype=torch.long, device=device)
            token = cache[0].run(token, position, place).squeeze(1).argmax(-1, keepdim=True)
            texts.append(token)
            if len(texts) in marks:
                torch.cuda.synchronize()
                stamps.append(time.perf_counter())
        return stamps

    return call


class Clock:
    """What `generate` of transformers calls with the prompt and with each token, on the CPU."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.stamps.append(time.perf_counter())

    def end(self) -> None:
        pass


def of_transformers(config: ModelConfig, device: torch.device) -> Continue:
    """transformers, which takes mamba_ssm's kernels when they are installed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_config_json(config, Layout.transformers, None)
    theirs = AutoConfig.for_model(**{key: value for key, value in values.items() if key != "architectures"})
    with device:
        model = AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).to(device).eval()

    def call(prompts: torch.Tensor, marks: Sequence[int]) -> list[float]:
        clock = Clock()
        options = {"do_sample": False, "max_new_tokens": marks[-1], "min_new_tokens": marks[-1], "pad_token_id": 0}
        model.generate(prompts, attention_mask=torch.ones_like(prompts), streamer=clock, **options)
        return [clock.stamps[mark] for mark in marks]

    return call


MAKERS: dict[str, Callable[[ModelConfig, torch.device], Continue]] = {
    "ours": ours,
    "mamba_ssm": of_mamba_ssm,
    "ours, fp32": partial(ours, state_dtype=torch.float32),
    "ours, bf16": partial(ours, state_dtype=torch.bfloat16),
    "transformers": of_transformers,
}


def milliseconds_per_token(call: Continue, prompts: torch.Tensor) -> list[float]:
    """The figures of one generation."""

    call(prompts, [BEFORE, BEFORE + 2])  # compiles
    began, ended = call(prompts, [BEFORE, BEFORE + 2])
    is_slow = (ended - began) / 2 * TOKENS > SLOW_SECONDS
    figures, tokens = (SLOW_FIGURES, SLOW_TOKENS) if is_slow else (FIGURES, TOKENS)
    stamps = call(prompts, [BEFORE + number * tokens for number in range(figures + 1)])
    return [1e3 * (after - before) / tokens for before, after in pairwise(stamps)]


def measure(name: str, config: ModelConfig, device: torch.device) -> dict[int, list[float]]:
    """Milliseconds per token by batch; a line says why there are none."""
    found: dict[int, list[float]] = {}
    try:
        with torch.no_grad():
            call = MAKERS[name](config, device)
            for batch in BATCHES:
                prompts = torch.randint(1, VOCAB_SIZE, (batch, PROMPT_TOKENS), device=device)
                found[batch] = milliseconds_per_token(call, prompts)
    except ImportError as error:
        print(f"{config.name:12} {name}: not installed ({error.name})", flush=True)
    except Exception as error:  # the rest of the table is worth having
        print(f"{config.name:12} {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
    call = None  # type: ignore[assignment]  # before the next model is made
    torch.cuda.empty_cache()
    return found


def main() -> None:
    """One line for each implementation, model and batch."""
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device, and on a CPU the figures would say nothing")
    versions = []
    for package in ("torch", "triton", "mamba_ssm", "causal_conv1d", "transformers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    print(f"{torch.cuda.get_device_name()}; {', '.join(versions)}; bf16, prompt {PROMPT_TOKENS}, greedy")
    ours_at: dict[tuple[str, int], list[float]] = {}  # with a state in fp16, bf16 and fp32
    for name in MAKERS:
        for model in sys.argv[1:] or MODELS:
            config = resolve_model_config(compose_config([f"model={model}"]).model, VOCAB_SIZE)
            for batch, found in measure(name, config, torch.device("cuda")).items():
                median = statistics.median(found)
                at = ours_at.setdefault((model, batch), [])
                if name.startswith("ours"):
                    at.append(median)
                beside = (
                    "" if name.startswith("ours") else "  times ours: " + ", ".join(f"{median / o:.2f}" for o in at)
                )
                row = f"{model:12} batch {batch:3}  {name:13} {median:8.3f} ms per token"
                print(f"{row} ({min(found):.3f} to {max(found):.3f}, {len(found)} times){beside}", flush=True)


if __name__ == "__main__":
    main()
