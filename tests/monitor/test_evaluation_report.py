"""Results of every kind and the samples of the checkpoints are on the page, escaped."""

import json
from pathlib import Path

from mamba_train.monitor.report import render_html
from mamba_train.monitor.run_record import load_run

from .runs import write_run

SCORE = {"nats_per_token": 2.5, "bits_per_byte": 1.25, "n_targets": 10, "n_bytes": 30}
RESULTS = {
    "perplexity-packed-step_00000020": {
        "kind": "perplexity-packed",
        "step": 20,
        "precision": "fp32",
        "protocol": "packed",
        "length": 32,
        "stride": None,
        "domains": {"Pile<CC>": SCORE, "ArXiv": SCORE},
        "all": SCORE,
    },
    "lengths-step_00000020": {"kind": "lengths", "step": 20, "lengths": {"32": SCORE, "64": SCORE}},
    "lengths-split_test-step_00000020": {
        "kind": "lengths",
        "step": 20,
        "split": "test",
        "precision": "bf16",
        "data": ["books=FOLDER"],
        "lengths": {"128": SCORE},
    },
    "task-step_00000020": {
        "kind": "task",
        "step": 20,
        "task": "mqar",
        "accuracy": {"512": 0.5},
        "paper": "100% somewhere",
    },
    "harness-step_00000020": {"kind": "harness", "step": 20, "limit": 7, "scores": {"lambada_openai/acc": 0.25}},
    "perplexity-sliding-step_00000020": {
        "kind": "perplexity-sliding",
        "step": 20,
        "protocol": "sliding",
        "length": 32,
        "stride": 8,
        "max_tokens": 5000,
        "domains": {"": SCORE},
        "all": SCORE,
    },
    "of-someone-else": {"all": 3},
}


def test_evaluations_and_samples_are_shown(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", n_steps=20)
    (run_dir / "evaluation").mkdir()
    for name, content in RESULTS.items():
        (run_dir / "evaluation" / f"{name}.json").write_text(json.dumps(content))
    (run_dir / "evaluation" / "lengths-step_00000020.png").write_bytes(b"picture")
    (run_dir / "samples").mkdir()
    for step in (10, 20):
        (run_dir / "samples" / f"step_{step:08d}.txt").write_text(f"text <b>of step</b> {step}")
    page = render_html([load_run(run_dir)])
    for expected in (
        "Pile&lt;CC&gt; (packed, length 32)",
        "all (packed, length 32)",
        "2.5000 nats per token, 1.2500 bits per byte",
        "length 64",
        "length 128, first 10 tokens, split test, bf16, books=FOLDER",
        "mqar, length 512",
        "50.00%",
        "100% somewhere",
        "lambada_openai/acc (first 7 requests)",
        "all (sliding, length 32, stride 8, first 5,000 tokens, precision unknown)",
        "not in the form of our results",
        "0.2500",
        'alt="lengths-step_00000020" src="data:image/png;base64,cGljdHVyZQ=="',
        "text &lt;b&gt;of step&lt;/b&gt; 10",
    ):
        assert expected in page
    assert page.index("after step 20") < page.index("after step 10"), "the newest first"


def test_a_run_without_any_has_none(tmp_path: Path) -> None:
    page = render_html([load_run(write_run(tmp_path / "run", n_steps=20))])
    assert "Evaluations" not in page
    assert "written at checkpoints" not in page
