"""Milliseconds per token of decoding, beside mamba_ssm and transformers, on models of published shapes.

    python -m benchmarks.decoding [MODEL ...]

Weights are random (the time does not depend on them), matrices bf16, sampling greedy, the prompt 64 tokens. A figure is
the difference of two generations, of 130 and of 2 tokens, divided by 128: the prompt and the capture of the graph are
in neither. Median and range of five. mamba_ssm decodes with its own CUDA graph (`cg=True`). What is not installed is
left out.
"""

from __future__ import annotations

import importlib.metadata
import statistics
import sys
import time
from collections.abc import Callable

import torch

from mamba_train.composition import compose_config
from mamba_train.config import ModelConfig
from mamba_train.convert.model_configs import to_config_json
from mamba_train.convert.names import Layout
from mamba_train.inference.generate import generate
from mamba_train.inference.load import inference_model
from mamba_train.inference.sampling import Sampling
from mamba_train.model.initialise import initialise_
from mamba_train.model.language_model import MambaLM, resolve_model_config

MODELS = ("mamba_130m", "mamba_1.4b", "mamba2_1.3b")
BATCHES = (1, 64)
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 64, 128, 5
VOCAB_SIZE = 50277
Generate = Callable[[int], object]  # so many tokens


def ours(config: ModelConfig, prompts: torch.Tensor) -> Generate:
    """Our generation, by CUDA graphs where there is a GPU."""
    with torch.device("meta"):
        model = MambaLM(config)
    model.to_empty(device="cpu")
    initialise_(model, config, seed=0)
    dtype = torch.bfloat16 if prompts.is_cuda else torch.float32
    ready = inference_model(config, dict(model.named_parameters()), prompts.device, dtype)
    rows = prompts.tolist()

    def call(n: int) -> object:
        return generate(ready, rows, Sampling(temperature=0), max_new_tokens=n, vocab_size=VOCAB_SIZE)

    return call


def of_mamba_ssm(config: ModelConfig, prompts: torch.Tensor) -> Generate:
    """The published implementation."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    values = to_config_json(config, Layout.state_spaces, None)
    model = MambaLMHeadModel(MambaConfig(**values), device="cuda", dtype=torch.bfloat16).eval()

    def call(n: int) -> object:
        return model.generate(prompts, max_length=prompts.shape[1] + n, cg=True, top_k=1)

    return call


def of_transformers(config: ModelConfig, prompts: torch.Tensor) -> Generate:
    """transformers, which takes mamba_ssm's kernels when they are installed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = to_config_json(config, Layout.transformers, None)
    theirs = AutoConfig.for_model(**{key: value for key, value in values.items() if key != "architectures"})
    dtype = torch.bfloat16 if prompts.is_cuda else torch.float32
    model = AutoModelForCausalLM.from_config(theirs, dtype=dtype).to(prompts.device).eval()
    mask = torch.ones_like(prompts)

    def call(n: int) -> object:
        return model.generate(
            prompts, attention_mask=mask, do_sample=False, max_new_tokens=n, min_new_tokens=n, pad_token_id=0
        )

    return call


def milliseconds_per_token(call: Generate) -> list[float]:
    """One figure for each repeat."""

    def seconds(n: int) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        call(n)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(2)  # compiles
    return [1e3 * (seconds(2 + NEW_TOKENS) - seconds(2)) / NEW_TOKENS for _ in range(REPEATS)]


def compare(config: ModelConfig, batch: int, device: torch.device) -> None:
    """Print one line for each implementation."""
    prompts = torch.randint(1, VOCAB_SIZE, (batch, PROMPT_TOKENS), device=device)
    makers = {"ours": ours, "mamba_ssm": of_mamba_ssm, "transformers": of_transformers}
    medians: dict[str, float] = {}
    for name, make in makers.items():
        try:
            with torch.no_grad():
                found = milliseconds_per_token(make(config, prompts))
        except ImportError as error:
            print(f"{config.name:12} batch {batch:3}  {name:13} not installed ({error.name})")
            continue
        medians[name] = statistics.median(found)
        beside = f"  {medians[name] / medians['ours']:.2f} times ours" if name != "ours" else ""
        spread = f"{min(found):.3f} to {max(found):.3f}"
        print(f"{config.name:12} batch {batch:3}  {name:13} {medians[name]:8.3f} ms per token ({spread}){beside}")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Compare all models at all batches."""
    if not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device, and on a CPU the figures would say nothing")
    versions = []
    for package in ("torch", "triton", "mamba_ssm", "transformers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    print(f"{torch.cuda.get_device_name()}; {', '.join(versions)}; bf16, prompt {PROMPT_TOKENS}, greedy")
    for name in sys.argv[1:] or MODELS:
        config = compose_config([f"model={name}"]).model
        config = resolve_model_config(config, VOCAB_SIZE)
        for batch in BATCHES:
            compare(config, batch, torch.device("cuda"))


if __name__ == "__main__":
    main()
