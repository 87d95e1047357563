"""The part of a run's report that shows what evaluations found, and what the model wrote on the way."""

import base64
import html
from typing import Any

from mamba_train.monitor.run_record import RunRecord

MAX_SHOWN = 40  # samples, evenly over the run


def evaluation_parts(run: RunRecord) -> list[str]:
    """Pieces of HTML: tables of results, then the samples of the checkpoints."""
    parts = []
    if run.evaluations:
        rows = "".join(_row(*row) for result in run.evaluations for row in _results(result))
        head = "<tr><th>evaluation</th><th>step</th><th>of</th><th>result</th></tr>"
        parts.append(f'<h3>Evaluations</h3><div class="wide"><table>{head}{rows}</table></div>')
    if run.evaluation_plots:
        parts.append("".join(image(content, name) for name, content in run.evaluation_plots))
    if run.samples:
        every = -(-len(run.samples) // MAX_SHOWN)
        # From the last one back, so that the newest is always shown.
        shown = run.samples[::-1][::every]
        texts = "".join(f"<h4>after step {step:,}</h4><pre>{html.escape(text)}</pre>" for step, text in shown)
        parts.append(f"<details><summary>Text written at checkpoints</summary>{texts}</details>")
    return parts


def image(content: bytes, alternative: str) -> str:
    """A PNG inside of the page."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'


def _row(*cells: str) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _results(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(kind, step, of what, value) for each line; kinds are those that `mamba_train.evaluation.results` writes."""
    kind, step = str(result.get("kind", "?")), str(result.get("step", "-"))
    try:
        found = _lines(result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        found = [("not in the form of our results", f"{type(error).__name__}: {error}")]
    return [(kind, step, of, value) for of, value in found]


def _lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if "all" in result:
        protocol = _protocol(result)
        found = [(f"{label or 'all'} ({protocol})", _score(score)) for label, score in result["domains"].items()]
        if len(found) > 1:
            found.append((f"all ({protocol})", _score(result["all"])))
    elif "lengths" in result:
        where = "".join(f", {part}" for part in _where(result))
        # So many tokens: the windows of another list of lengths, whose result may stand beside this one, have others.
        found = [
            (f"length {length}, first {score['n_targets']:,} tokens{where}", _score(score))
            for length, score in result["lengths"].items()
        ]
    elif "accuracy" in result:
        found = [(f"{result['task']}, length {length}", f"{value:.2%}") for length, value in result["accuracy"].items()]
        found.append(("the paper", result["paper"]))
    elif "scores" in result:
        limit = f" (first {result['limit']} requests)" if result.get("limit") else ""
        found = [(name + limit, f"{value:.4f}") for name, value in result["scores"].items()]
    return found


def _protocol(result: dict[str, Any]) -> str:
    """All without which a figure says little."""
    parts = [result["protocol"], f"length {result['length']}"]
    if result.get("stride"):
        parts.append(f"stride {result['stride']}")
    if result.get("max_tokens"):
        parts.append(f"first {result['max_tokens']:,} tokens")
    return ", ".join([*parts, *_where(result)])


def _where(result: dict[str, Any]) -> list[str]:
    """Of which text, and in which precision, where it is not what the run validates on, and fp32.

    Results of earlier versions do not say the precision: on a GPU it was bf16, on a CPU fp32.
    """
    split, precision = result.get("split", "validation"), result.get("precision", "precision unknown")
    return [
        *([] if split == "validation" else [f"split {split}"]),
        *([] if precision == "fp32" else [precision]),
        *(result.get("data") or []),
    ]


def _score(score: dict[str, float]) -> str:
    return f"{score['nats_per_token']:.4f} nats per token, {score['bits_per_byte']:.4f} bits per byte"
