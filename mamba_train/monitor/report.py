"""A report of one or several runs: a PNG of the curves and one HTML page that stands alone."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from mamba_train.monitor.evaluation_report import evaluation_parts, image
from mamba_train.monitor.figures import curves_figure, health_figure, png, report_figure
from mamba_train.monitor.progress import format_duration
from mamba_train.monitor.run_record import RunRecord, load_runs
from mamba_train.monitor.scaling import fit, scaling_figure, scaling_line, scaling_points
from mamba_train.run_folder import replace

MAX_SKIPPED_SHOWN = 50
MAX_SAMPLE_CHARACTERS = 20_000

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2rem auto; max-width: 110rem;
       padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(36rem, 1fr)); gap: 1.5rem; }
.figures img { width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: 0.3rem 1rem 0.3rem 0; border-bottom: 1px solid #ddd; text-align: left; }
td { font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { .figures { grid-template-columns: 1fr; } }
"""


@dataclass(frozen=True)
class Report:
    """The files a report was written to, and one line about each run and the fit through them."""

    png_path: Path
    html_path: Path
    lines: list[str]


def write_report(run_dirs: Sequence[Path], output: Path | None = None) -> Report:
    """Read the runs and write report.png and report.html.

    output: folder for both files; by default the run's own folder, or ./report for several runs.
    Raises ValueError when a run is missing, has no metrics or a broken file, and where nothing can be written.
    """
    runs = load_runs(list(run_dirs))
    if output is None:
        output = runs[0].path if len(runs) == 1 else Path("report")
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; expected a folder to write the report into")
    png_path, html_path = output / "report.png", output / "report.html"
    try:
        output.mkdir(parents=True, exist_ok=True)
        replace(png_path, png(report_figure(runs)))
        replace(html_path, render_html(runs))
    except OSError as error:  # that of a full disk names no file
        raise ValueError(f"--output {output}: cannot be written ({error})") from error
    lines = [_one_line(run) for run in runs]
    points = scaling_points(runs)
    if (law := fit(points)) is not None:
        lines.append(scaling_line(points, law))
    return Report(png_path, html_path, lines)


def render_html(runs: Sequence[RunRecord]) -> str:
    """The page: summary table, figures, and for each run its skipped steps, sample and config."""
    title = "mamba-train report: " + ", ".join(run.name for run in runs)
    figures = [image(png(curves_figure(runs)), "Curves of the runs")]
    figures += [image(png(health_figure(run)), f"SSM health of {run.name}") for run in runs if run.n_layers_observed]
    points = scaling_points(runs)
    if (law := fit(points)) is not None:
        figures.append(image(png(scaling_figure(points, law)), "Loss against compute"))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _summary_table(runs),
        f'<div class="figures">{"".join(figures)}</div>',
        *(_details(run) for run in runs),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _one_line(run: RunRecord) -> str:
    best = run.lowest("validation/bits_per_byte")
    if best is None:
        measured = "not validated yet"
    else:
        final = run.last("validation/bits_per_byte")
        measured = f"validation {final:.3f} bits per byte (best {best[1]:.3f} at step {best[0]})"
    bigram = run.bigram.get("bits_per_byte")
    return f"{run.name}: {measured}, bigram model {'not measured' if bigram is None else f'{bigram:.3f}'}"


def _summary_table(runs: Sequence[RunRecord]) -> str:
    rows = [_summary(run) | _domains(run) for run in runs]
    header = "".join(f"<th>{html.escape(run.name)}</th>" for run in runs)
    body = ""
    for label in dict.fromkeys(label for row in rows for label in row):
        cells = "".join(f"<td>{html.escape(row.get(label, '-'))}</td>" for row in rows)
        body += f"<tr><th>{html.escape(label)}</th>{cells}</tr>"
    return f'<div class="wide"><table><tr><th></th>{header}</tr>{body}</table></div>'


def _summary(run: RunRecord) -> dict[str, str]:
    best_loss, best_bits = run.lowest("validation/loss"), run.lowest("validation/bits_per_byte")
    return {
        "steps": f"{run.metrics[-1]['step']:,}",
        "tokens": _number(run.last("tokens"), ",.0f"),
        "parameters": _number(run.summary.get("n_parameters"), ",.0f"),
        "validation bits per byte, final": _number(run.last("validation/bits_per_byte"), ".4f"),
        "validation bits per byte, best": _at_step(best_bits),
        "bigram model, bits per byte": _number(run.bigram.get("bits_per_byte"), ".4f"),
        "validation loss (nats per token), final": _number(run.last("validation/loss"), ".4f"),
        "validation loss (nats per token), best": _at_step(best_loss),
        "bigram model, nats per token": _number(run.bigram.get("nats_per_token"), ".4f"),
        "training loss (nats per token), final": _number(run.last("loss"), ".4f"),
        "training time (steps only)": format_duration(run.training_seconds or None),
        "tokens per second, median": _number(run.median("tokens_per_second"), ",.0f"),
        "MFU, median": _number(run.median("mfu"), ".1%"),
        "skipped steps": str(len(run.skipped_steps)),
    }


def _domains(run: RunRecord) -> dict[str, str]:
    """One row for each domain that is validated on its own."""
    begin, end = "validation/", "/bits_per_byte"
    names = dict.fromkeys(
        key for record in run.metrics for key in record if key.startswith(begin) and key.endswith(end)
    )
    return {
        f"validation bits per byte, final: {name[len(begin) : -len(end)]}": _number(run.last(name), ".4f")
        for name in names
        if len(name) > len(begin) + len(end)
    }


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _at_step(point: tuple[int, float] | None) -> str:
    return "-" if point is None else f"{point[1]:.4f} (step {point[0]:,})"


def _details(run: RunRecord) -> str:
    skipped = run.skipped_steps
    shown = ", ".join(f"{step:,}" for step in skipped[:MAX_SKIPPED_SHOWN]) or "none"
    more = f" and {len(skipped) - MAX_SKIPPED_SHOWN:,} more" if len(skipped) > MAX_SKIPPED_SHOWN else ""
    parts = [f"<h2>{html.escape(run.name)}</h2>", f"<p>Skipped steps: {shown}{more}.</p>"]
    if run.sample is not None:
        parts.append(f"<h3>Text sample</h3><pre>{html.escape(run.sample[:MAX_SAMPLE_CHARACTERS])}</pre>")
    parts += evaluation_parts(run)
    if run.config:
        config = OmegaConf.to_yaml(OmegaConf.create(run.config))
        parts.append(f"<details><summary>Config</summary><pre>{html.escape(config)}</pre></details>")
    return "\n".join(parts)
