"""Text that the model writes at each checkpoint."""

from collections.abc import Callable
from pathlib import Path

import torch

from mamba_train.data.tokenizer import TextTokenizer
from mamba_train.inference.sampling import NOT_FINITE, Sampling, choose, uniform_draws
from mamba_train.run_folder import SAMPLES
from mamba_train.training.hooks.base import Hook, Metrics, write_or_warn
from mamba_train.training.trainer import Trainer

SAMPLING = Sampling(temperature=0.8, top_p=0.95)


class SamplesHook(Hook):
    """Writes `samples/step_00000500.txt`: one text for each prompt, from the beginning of a document on.

    By the parallel form, of a fixed length, token after token: sharded weights are gathered for a forward pass and for
    nothing else. The draws are the same each time and touch no generator of the run.
    """

    def __init__(
        self,
        prompts: list[str],
        n_tokens: int,
        interval_steps: int,
        tokenizer: TextTokenizer,
        run_dir: Path,
        log: Callable[[str], None],
    ) -> None:
        self._texts, self._n_tokens, self._interval_steps = prompts, n_tokens, interval_steps
        self._prompts = [[tokenizer.eos_id, *tokenizer.encode(text).tolist()] for text in prompts]
        self._tokenizer, self._run_dir, self._log = tokenizer, run_dir, log

    def on_step(self, trainer: Trainer, metrics: Metrics) -> None:
        if not self._n_tokens or (trainer.state.step % self._interval_steps and not trainer.finished):
            return
        texts = [self._continue(trainer, prompt) for prompt in self._prompts]
        if trainer.engine.rank == 0:
            write_or_warn(lambda: self._write(trainer.state.step, texts), self._log)

    def _write(self, step: int, texts: list[str]) -> None:
        path = self._run_dir / SAMPLES / f"step_{step:08d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")

    @torch.no_grad()
    def _continue(self, trainer: Trainer, prompt: list[int]) -> str:
        engine = trainer.engine
        # What comes after a position makes no difference to it, so the text may stand in a row of its final length.
        tokens = torch.zeros(1, len(prompt) + self._n_tokens, dtype=torch.int64, device=engine.device)
        tokens[0, : len(prompt)] = torch.tensor(prompt, device=engine.device)
        draws = uniform_draws(SAMPLING, 1, engine.device)
        length = len(prompt)
        trainer.check_stop()
        for _ in range(self._n_tokens):
            with engine.compute():
                logits = engine.model(tokens)[:, length - 1, : self._tokenizer.vocab_size]
            token = choose(logits, SAMPLING, next(draws))
            tokens[0, length] = token.clamp(min=0)
            length += 1
        written = tokens[0, 1:].tolist()
        if int(token) == NOT_FINITE:
            return "(the logits are not finite)"
        return self._tokenizer.decode(written)
