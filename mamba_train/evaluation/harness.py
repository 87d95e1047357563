"""A model of ours for EleutherAI's lm-evaluation-harness, which has the tasks of the papers' tables.

`HarnessModel` scores and generates with whatever functions it is given, so that a trained model and a run that is still
training take the same way; `PretrainedModel` is what the harness builds of `--model mamba_train --model_args
checkpoint=RUN`. This module needs the package lm_eval.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from mamba_train.convert.source import load_pretrained
from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.inference.load import inference_model
from mamba_train.inference.sampling import Sampling
from mamba_train.inference.text import generate_text

DEFAULT_MAX_LENGTH = 2048  # what the published models were trained at, and what the harness takes where nobody says
DEFAULT_BATCH_SIZE = 16
DEFAULT_MAX_NEW_TOKENS = 256

Logits = Callable[[Tensor], Tensor]
Generate = Callable[..., list[str]]
Scored = tuple[float, bool]


class HarnessModel(TemplateLM):
    """Answers the requests of the harness.

    logits: of tokens, int64 (rows, length) on the CPU, as (rows, length, padded vocabulary). generate: as
    `generate_text` without its first two arguments; None: tasks that generate are refused.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        logits: Logits,
        generate: Generate | None,
        max_length: int = DEFAULT_MAX_LENGTH,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        super().__init__()
        self._tokenizer, self._logits, self._generate = tokenizer, logits, generate
        self.max_length, self.batch_size = int(max_length), int(batch_size)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids without special tokens: there are none that a text could hold."""
        return self._tokenizer.encode(string).tolist()

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Scored]:
        """As the harness has it, without a bar of its own in the middle of ours."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows that each begin with one token of context."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            pairs = [(("", ""), *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        """Log-likelihood of each continuation after its context, and whether it is the most likely one by tokens."""
        found: dict[int, Scored] = {}
        # The longest first: what does not fit into memory is known at once, and rows of a batch are of like lengths.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            # What is too long loses its beginning.
            texts = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :] for i in chosen]
            inputs = torch.zeros(len(texts), max(len(text) for text in texts) - 1, dtype=torch.int64)
            for row, text in enumerate(texts):  # what fills a row up comes after it, where a causal model does not look
                inputs[row, : len(text) - 1] = torch.tensor(text[:-1], dtype=torch.int64)
            logits = self._logits(inputs)
            for row, i in enumerate(chosen):
                found[i] = _score(logits[row, : len(texts[row]) - 1], requests[i][2])
                if requests[i][0] != ("", ""):
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return [found[i] for i in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue contexts of any lengths, each up to its stop strings."""
        if self._generate is None:
            raise ValueError("evaluation.tasks: a task that generates text runs on a finished checkpoint only")
        found: dict[int, str] = {}
        by_settings: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(number)
        for numbers in by_settings.values():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            settings = normalize_gen_kwargs(requests[numbers[0]].args[1], DEFAULT_MAX_NEW_TOKENS)
            for first in range(0, len(numbers), self.batch_size):
                chosen = numbers[first : first + self.batch_size]
                texts = self._continue([requests[number].args[0] for number in chosen], dict(settings))
                found |= dict(zip(chosen, texts, strict=True))
                for number, text in zip(chosen, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [found[number] for number in range(len(requests))]

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        n_new = int(settings["max_gen_toks"])
        room = self.max_length - n_new
        if room < 1:
            raise ValueError(f"max_gen_toks={n_new}: expected less than max_length ({self.max_length})")
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts]
        # As the harness's other models have it, a top_k of 0 leaves all tokens.
        top_k, top_p = settings.get("top_k") or None, settings.get("top_p") or 1.0
        sampling = Sampling(float(settings.get("temperature") or 0.0), top_k, float(top_p))
        assert self._generate is not None
        stops = [stop for stop in settings.get("until") or [] if stop]
        return self._generate(prompts, sampling, max_new_tokens=n_new, stop_strings=stops)


@register_model("mamba_train")
class PretrainedModel(HarnessModel):
    """A run, a checkpoint, or weights in a published layout, by `--model_args checkpoint=PATH`.

    Further arguments: max_length (tokens that a request may have), precision (fp32 or bf16; by default bf16 on a GPU).
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        max_length: int = DEFAULT_MAX_LENGTH,
        batch_size: int | str | None = DEFAULT_BATCH_SIZE,
        device: str | None = None,
        precision: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        if unknown or checkpoint is None:
            said = f"{next(iter(unknown))}: there is no such argument" if unknown else "checkpoint is missing"
            raise ValueError(f"--model_args {said}; expected checkpoint=PATH, and max_length, precision where needed")
        pretrained = load_pretrained(checkpoint, print)
        if pretrained.tokenizer is None:
            raise ValueError(f"checkpoint={checkpoint}: there is no tokenizer.json here")
        if precision not in (None, "fp32", "bf16"):
            raise ValueError(f"precision={precision}: expected fp32 or bf16")
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        is_bf16 = precision == "bf16" if precision else where.type == "cuda"
        model = inference_model(
            pretrained.config, pretrained.tensors, where, torch.bfloat16 if is_bf16 else torch.float32
        )
        tokenizer = TextTokenizer(pretrained.tokenizer, f"the tokenizer of {checkpoint}")

        def generate(*arguments: Any, **options: Any) -> list[str]:
            return generate_text(model, tokenizer, *arguments, **options)

        # "auto" would search for the largest that fits.
        size = DEFAULT_BATCH_SIZE if batch_size in (None, "auto") else int(str(batch_size))
        super().__init__(tokenizer, lambda tokens: model(tokens.to(where)), generate, int(max_length), size)
        self._device = where


def _score(logits: Tensor, continuation: list[int]) -> Scored:
    """logits: (length, classes) of a text's inputs; its last tokens are the continuation.

    Padded entries of the vocabulary are classes like any other, as in training.
    """
    kept = continuation[-len(logits) :]
    log_probabilities = torch.log_softmax(logits[-len(kept) :].float(), dim=-1)
    targets = torch.tensor(kept, device=logits.device)
    chosen = log_probabilities.gather(-1, targets.unsqueeze(-1)).sum()
    return float(chosen), bool((log_probabilities.argmax(-1) == targets).all())
