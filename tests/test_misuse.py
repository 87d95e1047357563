"""Mistakes of a user: one clear line, exit code 2, no traceback, nothing lost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import REPOSITORY, environment, metrics, train, train_command


def check(result: subprocess.CompletedProcess[str], *expected: str) -> None:
    """Exit code 2 and, as the last thing said, one line with all of `expected`."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for text in expected:
        assert text in lines[0]


def command_line(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *arguments],
        env={**environment(), **more},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["model.d_modl=3"], ["model.d_modl", "did you mean model.d_model?"]),
        (["lr=3"], ["lr:", "did you mean optim.lr?"]),
        (["+model.width=3"], ["model.width: there is no such key"]),
        (["modell=mamba_tiny"], ["modell", "did you mean model?"]),
        (["model=mamba_tinny"], ["model=mamba_tinny", "did you mean mamba_tiny?", "mamba_130m"]),
        (["experiment=smke"], ["experiment=smke", "did you mean smoke?"]),
        (["model.d_model=wide"], ["model.d_model=wide", "a whole number"]),
        (["optim.lr=fast"], ["optim.lr=fast", "a number"]),
        (["engine.compile=maybe"], ["engine.compile=maybe", "true or false"]),
        (["logging.wandb=onlin"], ["logging.wandb=onlin", "offline", "did you mean online?"]),
        (["model.d_model=null"], ["model.d_model=null", "a value is needed"]),
        (["model.d_model"], ["cannot read the command line", "KEY=VALUE"]),
        (["run_dir=läufe/1"], ["cannot read the command line", "quotes around a value with", "letters beyond ASCII"]),
        (["training.global_batch_size=7"], ["training.global_batch_size=7", "training.micro_batch_size (8)"]),
        (["schedule.warmup_steps=900"], ["schedule.warmup_steps=900", "training.total_steps"]),
        (["model.dt_min=0.5"], ["model.dt_min=0.5", "model.dt_max (0.1)"]),
        (["model.mixer=mamba3"], ["model.mixer=mamba3", "mamba1, mamba2, attention"]),
        (["model=mamba2_tiny", "model.head_dim=24"], ["model.head_dim=24", "divisor", "2 * 128 = 256"]),
        (["model=mamba2_tiny", "model.n_groups=3"], ["model.n_groups=3", "divisor of the number of heads", "16"]),
        (["model=mamba2_tiny", "model.chunk_size=0"], ["model.chunk_size=0", "more than 0"]),
        (["model=mamba2_tiny", "model.A_init_min=20"], ["model.A_init_min=20", "model.A_init_max (16.0)"]),
        (["model.attention_layers=[1]"], ["model.attention_heads=None", "number of heads"]),
        (["model=hybrid_tiny", "model.n_layer=2"], ["model.attention_layers=[2]", "from 0 to 1"]),
        (["model=hybrid_tiny", "model.attention_layers=[1,1]"], ["model.attention_layers=[1, 1]", "each layer once"]),
        (["model=hybrid_tiny", "model.attention_heads=3"], ["model.attention_kv_heads=2", "attention_heads (3)"]),
        (
            ["model=transformerpp_130m", "model.attention_heads=7"],
            ["model.attention_heads=7", "model.d_model (768)", "model.attention_head_dim"],
        ),
        (["model=hybrid_tiny", "model.rotary_dim=5"], ["model.rotary_dim=5", "even number", "(32)"]),
        (["model=hybrid_tiny", "model.d_intermediate=-1"], ["model.d_intermediate=-1", "0 or more"]),
        (["training.total_steps=0"], ["training.total_steps=0", "more than 0"]),
        (["data=local"], ["data.path"]),
        (["data=local", "data.path=/no/such/folder"], ["data.path=/no/such/folder", "no such file or folder"]),
        (["data.repeat=false"], ["data.repeat=False", "expected true", "data.source=stdlib does not read it"]),
        (["data.cache_shards=true"], ["data.cache_shards=True", "expected false", "data=stream does"]),
        (
            ["data=stream", "data.path=docs", "data.tokenizer=LICENSE", "data.hub_revision=a"],
            ["expected null", "hf:NAME"],
        ),
        (["optim.lr=inf"], ["optim.lr=inf", "finite"]),
        (["guard.norm_ratio=1"], ["guard.norm_ratio=1", "more than 1"]),
        (["guard.min_steps=0"], ["guard.min_steps=0", "more than 0"]),
        (["watchdog.step_seconds=0"], ["watchdog.step_seconds=0", "more than 0"]),
        (["checkpoint.reserve_gib=nan"], ["checkpoint.reserve_gib=nan", "finite"]),
        (["engine.name=fdsp"], ["engine.name=fdsp", "single"]),
        (["engine=deepspeed", "engine.zero_stage=4"], ["engine.zero_stage=4", "1, 2 or 3"]),
        (["engine=deepspeed", "engine.cuda_graphs=true"], ["engine.cuda_graphs=True", "engine=single"]),
        (["engine=deepspeed", "engine.compile=true"], ["engine.compile=True", "engine=fsdp compiles"]),
        (["engine=ddp", "engine.replicas=2"], ["engine.replicas=2", "engine=fsdp has replicas"]),
        (
            ["engine=fsdp", "engine.recompute=keep_scan", "engine.reshard_after_forward=false"],
            ["engine.reshard_after_forward=False", "engine.recompute=layer"],
        ),
        (["engine.reduce_precision=auto"], ["engine.reduce_precision=auto", "fp32 or bf16"]),
        (["run_dir="], ["run_dir=''"]),
        (["run_dir=/etc/passwd/run"], ["run_dir=/etc/passwd/run", "/etc/passwd is a file"]),
        (["model.vocab_size=300"], ["model.vocab_size=300", "data.vocab_size (4096)"]),
        (["data=null"], ["group", "GROUP=OPTION"]),
        (["data=local", "data.path=/tmp/my texts (1)"], ["quotes"]),
        (["data.tokenizer=/no/such.json"], ["data.tokenizer=/no/such.json", "no such file"]),
        (["data.sources={a:/b}"], ["data.sources: names are added one by one", "+data.sources.NAME=VALUE"]),
        (["+data.sources.a=/tmp"], ["data.sources={'a': '/tmp'}", "data.source=stdlib reads none"]),
        (["data=shards", "data.path=null"], ["data.path=None", "folder of token shards", "+data.sources.NAME=FOLDER"]),
        (["data=shards", "data.path=/tmp", "+data.sources.a=/tmp"], ["data.path=/tmp", "null beside data.sources"]),
        (["data=shards", "data.path=null", "+data.sources.a=/no/such"], ["data.sources.a=/no/such", "token shards"]),
        (["+data.validation_paths.a=/no/such"], ["data.validation_paths.a=/no/such", "token shards"]),
        (["data.mixture=[{from_step:1,weights:{a:1}}]"], ["data.mixture[0].from_step=1", "expected 0"]),
        (
            ["data.mixture=[{from_step:0,weights:{a:1}},{from_step:0,weights:{a:1}}]"],
            ["data.mixture[1].from_step=0", "more than 0"],
        ),
        (["data.mixture=[{from_step:0,weights:{a:-1,b:2}}]"], ["data.mixture[0].weights", "0 or more"]),
        (["data.mixture=[{from_step:0}]"], ["data.mixture[0].weights has no value"]),
        (["data.mixture=[{from_step:0,weight:{a:1}}]"], ["data.mixture: Key 'weight' not in", "weights:{A:0.3,B:0.7}"]),
        (["data.mixture=[{from_step:0,weights:{a:x}}]"], ["data.mixture: Value 'x'", "weights numbers"]),
        (["data.mixture=[{from_step:0,weights:{2020:1}}]"], ["data.mixture: Key 2020 (int)", "quotes around a name"]),
        (["data.mixture=[{from_step:0.5,weights:{a:1}}]"], ["data.mixture: Value '0.5'", "from_step a whole number"]),
        (["data.mixture={}"], ["data.mixture: Cannot merge", "expected a list of stages"]),
        (
            ["data=shards", "data.path=null", "+data.sources.a=/tmp", "data.mixture=[{from_step:0,weights:{b/x:1}}]"],
            ["data.mixture[0].weights=b/x", "a source of data.sources (a)"],
        ),
        (
            ["data=shards", "data.path=null", "+data.sources.a=/", "data.mixture=[{from_step:0,weights:{a:1,a/x:1}}]"],
            ["data.mixture[0].weights=a/x", "a is there as well, which contains it"],
        ),
        (["data=mixture"], ["data.sources.pile=PATH_TO/pile", "token shards"]),
        (["data.workers=-1"], ["data.workers=-1", "0 or more"]),
        (["data.prefetch_batches=0"], ["data.prefetch_batches=0", "more than 0"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_a_wrong_command_line(tmp_path: Path, arguments: list[str], expected: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported first')")
    check(command_line(*arguments, PYTHONPATH=str(tmp_path)), *expected)


def test_graphs_without_a_gpu() -> None:
    """Only torch knows whether there is one."""
    check(command_line("engine.cuda_graphs=true", "engine.device=cpu"), "engine.cuda_graphs=true", "no CUDA device")


def test_help_and_cfg() -> None:
    shown = command_line("--help")
    assert shown.returncode == 0
    for group in ("model", "data", "optim", "schedule", "engine", "logging", "checkpoint", "experiment"):
        assert f"\n  {group} " in shown.stdout
    composed = command_line("model=mamba_130m", "--cfg", "job")
    assert composed.returncode == 0
    assert "d_model: 768" in composed.stdout


def test_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(train(tmp_path / "run", tmp_path / "empty"), "data.path", "empty")


def test_invalid_json_names_file_and_line(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": f"document {i}"}) for i in range(10)]
    lines[6] = '{"text": "half a docu'
    (folder / "part.jsonl").write_text("\n".join(lines))
    check(train(tmp_path / "run", folder), "part.jsonl:7")


def test_a_checkpoint_of_another_model(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=5").returncode == 0
    before = (run_dir / "metrics.jsonl").read_text()
    check(train(run_dir, corpus, "training.total_steps=10", "model.d_model=48"), "model.d_model", "run_dir")
    assert (run_dir / "metrics.jsonl").read_text() == before
    # The table lets total_steps change: the refused start has broken nothing.
    assert train(run_dir, corpus, "training.total_steps=10").returncode == 0
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 11))


def test_resume_false_starts_over_and_keeps_the_earlier_run(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=5").returncode == 0
    again = train(run_dir, corpus, "training.total_steps=5", "model.d_model=48", "checkpoint.resume=false")
    assert again.returncode == 0, again.stderr
    assert len(metrics(run_dir)) == len(metrics(tmp_path / "run.old-1")) == 5


def test_resume_false_moves_nothing_that_the_run_needs(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=5").returncode == 0
    check(train(run_dir, corpus, "checkpoint.resume=false", f"init_from={run_dir}"), "another run_dir", str(run_dir))
    tokenizer = run_dir / "tokenizer.json"
    check(train(run_dir, corpus, "checkpoint.resume=false", f"data.tokenizer={tokenizer}"), str(tokenizer), "needs")
    (link := run_dir / "texts").symlink_to(corpus.parent)  # which would move with the folder
    check(train(run_dir, link / corpus.name, "checkpoint.resume=false"), str(link), "needs")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_no_space_for_checkpoints_does_not_stop_the_training(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    result = train(run_dir, corpus, "training.total_steps=12", "checkpoint.reserve_gib=1e9")
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 13))
    assert "step 5 was not saved, training goes on" in result.stdout
    assert "step 10 was not saved, training goes on" in result.stdout
    # The weights of the end could not be kept: that must not look like success.
    assert result.returncode == 1
    assert result.stderr.startswith("error: no space for a checkpoint")
    assert "checkpoint.reserve_gib" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list((run_dir / "checkpoints").glob("step_*"))


def test_all_checkpoints_damaged_is_not_a_fresh_start(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=5").returncode == 0
    (run_dir / "checkpoints" / "step_00000005" / "state.json").write_text("{}")
    result = train(run_dir, corpus, "training.total_steps=10")
    check(result, "none of its checkpoints is complete", "checkpoint.resume=false")
    assert "state.json" in result.stdout
    assert len(metrics(run_dir)) == 5


def test_ctrl_c_is_no_traceback(tmp_path: Path, corpus: Path) -> None:
    process = subprocess.Popen(
        train_command(tmp_path / "run", corpus, "training.total_steps=5000"),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and path.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "the same command goes on" in stderr
    assert "Traceback" not in stderr


def test_a_truncated_checkpoint_falls_back_loudly(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    assert train(run_dir, corpus, "training.total_steps=10").returncode == 0
    [weights] = (run_dir / "checkpoints" / "step_00000010" / "model").iterdir()
    weights.write_bytes(weights.read_bytes()[:-100])
    result = train(run_dir, corpus, "training.total_steps=15")
    assert result.returncode == 0, result.stderr
    assert "step_00000010 is damaged" in result.stdout
    assert "step_00000005 is used instead" in result.stdout
    assert [record["step"] for record in metrics(run_dir)] == list(range(1, 16))
