"""The report shows what the run recorded, in files that stand alone, and escapes what it did not write."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mamba_train.monitor import figures
from mamba_train.monitor.figures import curves_figure, health_figure, png, report_figure, smooth
from mamba_train.monitor.report import render_html, write_report
from mamba_train.monitor.run_record import load_run, load_runs

from .runs import write_run


class Page(HTMLParser):
    """Collects the text of table cells and <pre>, the tags, and where a resource is fetched from."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self._open: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag in ("td", "th", "pre", "h2", "p"):
            self._open = tag
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._open:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.texts[self._open][-1] += data

    def table(self) -> dict[str, str]:
        """Label to value, for a page about one run."""
        return dict(zip(self.texts["th"][2:], self.texts["td"], strict=True))


def test_each_domain_that_is_validated_on_has_a_line(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, n_steps=60) for name in "ab"]
    path = runs[1] / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for number, value in ((39, 1.5), (59, 1.25)):
        domain = {"validation/Wikipedia (en)/loss": 3.0, "validation/Wikipedia (en)/bits_per_byte": value}
        lines[number] = json.dumps(json.loads(lines[number]) | domain)
    path.write_text("\n".join(lines) + "\n")
    label = "validation bits per byte, final: Wikipedia (en)"
    assert Page(render_html([load_run(runs[1])])).table()[label] == "1.2500"
    both = Page(render_html([load_run(run) for run in runs]))
    row = both.texts["th"].index(label) - 3  # behind the corner and the names of the runs
    assert both.texts["td"][2 * row : 2 * row + 2] == ["-", "1.2500"]
    assert label not in Page(render_html([load_run(runs[0])])).table()


def test_table_states_final_and_best_values_beside_the_bigrams(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", n_steps=60, skipped=(7, 9))
    # The best validation is not the last: make the one at step 40 the lowest.
    metrics = (run_dir / "metrics.jsonl").read_text().splitlines()
    metrics[39] = re.sub(r'"validation/bits_per_byte": [\d.]+', '"validation/bits_per_byte": 1.25', metrics[39])
    (run_dir / "metrics.jsonl").write_text("\n".join(metrics) + "\n")
    page = Page(render_html([load_run(run_dir)]))
    table = page.table()
    final = (3.0 + 5.0 * np.exp(-3) + 0.1) / np.log(2) / 2.9
    assert table["steps"] == "60"
    assert table["tokens"] == "122,880"
    assert table["parameters"] == "1,234,567"
    assert table["validation bits per byte, final"] == f"{final:.4f}"
    assert table["validation bits per byte, best"] == "1.2500 (step 40)"
    assert table["bigram model, bits per byte"] == "2.5000"
    assert table["training time (steps only)"] == "0:12"
    assert table["skipped steps"] == "2"
    assert "Skipped steps: 7, 9." in page.texts["p"]


def test_the_page_needs_nothing_else_and_holds_the_figures(tmp_path: Path) -> None:
    page = Page(render_html([load_run(write_run(tmp_path / "a"))]))
    assert len(page.sources) == 2  # curves, SSM health
    for source in page.sources:
        kind, data = source.split(",", 1)
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG")
    assert "link" not in page.tags
    assert "script" not in page.tags


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> & \"quotes\""
    run_dir = write_run(tmp_path / "<i>run & co", sample_txt=evil)
    (run_dir / "config.yaml").write_text("data:\n  path: <script>boo</script>\n  api_key: hunter2\n")
    text = render_html([load_run(run_dir)])
    page = Page(text)
    assert "script" not in page.tags
    assert "i" not in page.tags
    assert page.texts["pre"][0] == evil
    assert "<script>boo</script>" in page.texts["pre"][1]
    assert "hunter2" not in text
    assert "<i>run & co" in page.texts["h2"]


def test_files_are_written_beside_the_run_and_the_line_names_both_models(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a")
    report = write_report([run_dir])
    assert (report.png_path, report.html_path) == (run_dir / "report.png", run_dir / "report.html")
    final = (3.0 + 5.0 * np.exp(-3) + 0.1) / np.log(2) / 2.9
    assert report.lines == [
        f"a: validation {final:.3f} bits per byte (best {final:.3f} at step 60), bigram model 2.500"
    ]
    image = Image.open(report.png_path)
    assert image.width >= 1000
    assert len(set(image.convert("L").resize((200, 200)).getdata())) > 20  # something is drawn


def test_several_runs_share_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = write_run(tmp_path / "x" / "run"), write_run(tmp_path / "y" / "run", bias=1.0, bigram=None)
    report = write_report([first, second])
    assert report.html_path == Path("report/report.html")
    assert [line.split(":")[0] for line in report.lines] == ["x/run", "y/run"]
    assert report.lines[1].endswith("bigram model not measured")
    page = Page(report.html_path.read_text())
    assert page.texts["h2"] == ["x/run", "y/run"]
    assert len(page.sources) == 3  # curves, two healths


def test_curves_hold_the_recorded_points_and_the_bigram_line(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", skipped=(7,)))
    loss, bits, norm, _, speed = curves_figure([run]).axes
    for axis, name in ((loss, "loss"), (bits, "bits_per_byte")):
        raw, smoothed, validation = axis.lines[:3]
        assert list(raw.get_xdata()) == [step for step in range(1, 61) if step != 7]
        assert list(raw.get_ydata()) == run.series(name)[1]
        assert len(smoothed.get_xdata()) == 59
        assert list(validation.get_xdata()) == [20, 40, 60]
        assert list(validation.get_ydata()) == run.series(f"validation/{name}")[1]
    assert any(set(line.get_ydata()) == {2.5} for line in bits.lines)
    assert any("bigram 2.500" in text.get_text() for text in bits.texts)
    assert bits.get_ylim()[1] > 2.5
    assert any(list(line.get_xdata()) == [7] for line in loss.lines)
    assert list(norm.lines[0].get_ydata()) == run.series("grad_norm")[1]
    assert list(speed.lines[0].get_ydata()) == run.series("tokens_per_second")[1]


def test_health_has_a_line_and_a_bar_per_layer(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "a", n_layer=3))
    figure = health_figure(run)
    steps, decay, memory, by_layer, decay_by_layer, _ = figure.axes[:6]
    assert [list(line.get_xdata()) for line in steps.lines] == [[20, 40, 60]] * 9  # 3 layers x 3 quantiles
    assert sorted({line.get_ydata()[-1] for line in decay.lines}) == [1.0, 2.0, 3.0, 16.0]
    assert any(set(line.get_ydata()) == {256} for line in memory.lines)
    bars = [line for line in by_layer.lines if len(line.get_xdata()) == 2]
    assert [line.get_xdata()[0] for line in bars] == [0, 1, 2]
    assert [sorted(line.get_ydata()) for line in decay_by_layer.lines] == [[1, 16], [2, 16], [3, 16]]
    floor, saturated, state = figure.axes[6:9]
    assert [line.get_ydata()[-1] for line in floor.lines] == [0.0, 0.01, 0.02]
    assert [list(line.get_xdata()) for line in saturated.lines] == [[20, 40, 60]] * 3
    assert [list(line.get_ydata()) for line in state.lines] == [[0.9, 1.3, 1.7]] * 3


def test_a_run_may_have_any_name(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name)) for name in (r"_a$\frac{$", "b$^$", "_")]
    legend = curves_figure(runs).axes[0].get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:3] == [r"a\$\frac{\$", r"b\$^\$", "_"]
    for run in runs:
        assert png(report_figure([run])).startswith(b"\x89PNG")


def test_a_young_run_without_validation_health_or_side_files_is_reported(tmp_path: Path) -> None:
    run_dir = tmp_path / "young"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step":1,"loss":8.0}\n{"step":2,"lo')
    report = write_report([run_dir])
    assert report.lines == ["young: not validated yet, bigram model not measured"]
    assert len(Page(report.html_path.read_text()).sources) == 1


def test_a_long_run_is_drawn_from_few_points_the_last_included(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MAX_POINTS", 20)
    run = load_run(write_run(tmp_path / "a", n_steps=61))
    line = report_figure([run]).subfigs[0].axes[0].lines[0]
    assert len(line.get_xdata()) == 20
    assert line.get_xdata()[-1] == 61


@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50), window=st.integers(1, 60))
def test_smoothing_averages_a_centred_window(values: list[float], window: int) -> None:
    smoothed = smooth(values, window)
    for i in range(len(values)):
        reach = min(i, len(values) - 1 - i, window // 2)
        assert smoothed[i] == pytest.approx(np.mean(values[i - reach : i + reach + 1]), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", None, "has no metrics.jsonl"),
        ("baseline.json", "{nonsense", "baseline.json is not valid JSON"),
        ("summary.json", "[1]", "summary.json should hold a JSON object, found list"),
        ("config.yaml", "a: [1", "config.yaml is not a valid config"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    run_dir = write_run(tmp_path / "a")
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load_runs([run_dir])
    assert "\n" not in str(caught.value)
