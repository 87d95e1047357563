"""`mamba-train convert` and `init_from` on the command line, on runs that train.py made."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import REPOSITORY, environment, metrics, train


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("convert") / "run"
    assert train(run_dir, corpus, "training.total_steps=10").returncode == 0
    return run_dir


def convert(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mamba_train", "convert", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**environment(), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_out_in_and_on(run_dir: Path, corpus: Path, tmp_path: Path) -> None:
    """Export, import, generate, and go on training from the export and from the run that the import made."""
    exported = convert("export", run_dir, tmp_path / "out", "--layout", "state-spaces")
    assert exported.returncode == 0, exported.stderr
    assert "weights bit-equal, logits within" in exported.stdout
    imported = convert("import", tmp_path / "out", tmp_path / "imported")
    assert imported.returncode == 0, imported.stderr
    sample = subprocess.run(
        [sys.executable, "-m", "mamba_train", "generate", str(tmp_path / "imported"), "--max-new-tokens", "5"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert sample.returncode == 0, sample.stderr
    losses = {}
    for source in (tmp_path / "out", tmp_path / "imported"):
        again = tmp_path / f"from-{source.name}"
        options = ["training.total_steps=2", "schedule.warmup_steps=0", "optim.lr=1e-4", f"init_from={source}"]
        options.append("schedule.kind=constant")
        result = train(again, corpus, *options)
        assert result.returncode == 0, result.stderr
        assert f"the initial weights are those of {source}" in result.stdout
        losses[source] = [record["loss"] for record in metrics(again)]
        assert metrics(again)[0]["lr"] == pytest.approx(1e-4)
    assert len(set(map(tuple, losses.values()))) == 1, "the same weights, the same losses"
    # Trained weights: the first loss is near the run's last, not near its first.
    first, last = metrics(run_dir)[0]["loss"], metrics(run_dir)[-1]["loss"]
    assert abs(losses[source][0] - last) < abs(losses[source][0] - first)


def test_a_resume_takes_the_checkpoint_and_not_init_from(run_dir: Path, corpus: Path, tmp_path: Path) -> None:
    again, source = tmp_path / "again", tmp_path / "source"
    shutil.copytree(run_dir, source)
    common = ("schedule.warmup_steps=0", f"init_from={source}", "schedule.kind=constant")
    assert train(again, corpus, "training.total_steps=8", *common).returncode == 0
    whole = [record["loss"] for record in metrics(again)]
    assert train(tmp_path / "cut", corpus, "training.total_steps=5", *common).returncode == 0
    shutil.rmtree(source)  # by now it may be gone: nothing of it is read again
    resumed = train(tmp_path / "cut", corpus, "training.total_steps=8", *common)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 5" in resumed.stdout
    assert [record["loss"] for record in metrics(tmp_path / "cut")] == whole


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.n_layer=3"], ["model.n_layer is 2 there and 3 here"]),
        (["model.d_state=8", "model.expand=3"], ["model.d_state is 4 there and 8 here", "d_state, expand"]),
        (["model.mixer=mamba2", "model.head_dim=16"], ["model.mixer is mamba1 there and mamba2 here"]),
        (["model.pad_vocab_size_multiple=64"], ["1 weight has another shape", "(304, 32) instead of (320, 32)"]),
    ],
)
def test_weights_of_another_model(
    run_dir: Path, corpus: Path, tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    result = train(tmp_path / "run", corpus, f"init_from={run_dir}", *overrides)
    assert result.returncode == 2, result.stdout
    [line] = result.stderr.strip().splitlines()
    for text in ["init_from=", *expected]:
        assert text in line


def test_weights_that_are_not_there_are_missed_before_the_data_is_prepared(corpus: Path, tmp_path: Path) -> None:
    result = train(tmp_path / "run", corpus, "init_from=no/such", f"data.cache_dir={tmp_path / 'cache'}")
    assert result.returncode == 2
    assert "init_from=no/such: there is no such path" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_weights_of_another_tokenizer(run_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "corpus"
    other.mkdir()
    for number in range(30):
        (other / f"{number}.txt").write_text("Altogether different words make altogether different pieces. " * 20)
    # The same number of rows, other tokens in them.
    result = train(tmp_path / "run", other, f"init_from={run_dir}", "model.vocab_size=300")
    assert result.returncode == 2, result.stdout
    assert "another tokenizer" in result.stderr
    assert "data.tokenizer" in result.stderr


def test_an_imported_run_is_not_resumed(run_dir: Path, corpus: Path, tmp_path: Path) -> None:
    assert convert("import", run_dir, tmp_path / "imported").returncode == 0
    result = train(tmp_path / "imported", corpus)
    assert result.returncode == 2
    assert f"init_from={tmp_path / 'imported'}" in result.stderr


@pytest.mark.parametrize("family", [pytest.param("mamba", marks=pytest.mark.slow), "mamba2"])
def test_a_checkpoint_that_transformers_saved_goes_on_training(
    family: str, corpus: Path, run_dir: Path, tmp_path: Path
) -> None:
    """Odd sizes throughout, as transformers itself writes them, its tokenizer.json being ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 3, "vocab_size": 301, "conv_kernel": 3}
    overrides = [
        "model.n_layer=3",
        "model.d_model=36",
        "model.vocab_size=301",
        "model.pad_vocab_size_multiple=1",
        "model.d_conv=3",
        "model.tie_embeddings=false",
    ]
    if family == "mamba":
        config = transformers.MambaConfig(**sizes, state_size=5, time_step_rank=7, expand=3, tie_word_embeddings=False)
        overrides += ["model.d_state=5", "model.dt_rank=7", "model.expand=3"]
    else:
        config = transformers.Mamba2Config(**sizes, state_size=10, head_dim=9, num_heads=8, n_groups=2, chunk_size=8)
        overrides += ["model.mixer=mamba2", "model.d_state=10", "model.head_dim=9", "model.n_groups=2"]
        overrides += ["model.chunk_size=8"]
    folder = tmp_path / "saved"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((run_dir / "tokenizer.json").read_bytes())
    trained = train(tmp_path / "run", corpus, "training.total_steps=12", f"init_from={folder}", *overrides)
    assert trained.returncode == 0, trained.stderr
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    exported = convert("export", tmp_path / "run", tmp_path / "out", "--layout", "transformers")
    assert exported.returncode == 0, exported.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 301


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "/no/such/run", "OUT", "--layout", "transformers"], "/no/such/run: there is no such path"),
        (["export", "RUN", "RUN", "--layout", "transformers"], "exists already"),
        (["import", "no/such", "OUT"], "no/such: there is no such path, and it could not be downloaded"),
        (["export", "RUN", "OUT", "--layout", "gguf"], "invalid choice: 'gguf'"),
    ],
)
def test_mistakes_are_one_line(run_dir: Path, tmp_path: Path, arguments: list[str], expected: str) -> None:
    places = {"RUN": run_dir, "OUT": tmp_path / "out"}
    result = convert(*(places.get(argument, argument) for argument in arguments))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert expected in result.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
