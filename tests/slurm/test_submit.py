"""What is submitted, and what is refused before it is; no cluster needed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mamba_train.composition import compose_config
from mamba_train.config_checks import seconds_of
from slurm.script import LINE, TEMPLATE, render
from slurm.submit import compose_submission, plan, sweep
from tests.helpers import REPOSITORY, environment
from tests.slurm.rendered import BASE, script_of


def bash_accepts(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_the_script_says_what_the_config_says(tmp_path: Path) -> None:
    script = script_of(
        tmp_path,
        "slurm.time=1-12:00:00",
        "slurm.partition=gpu",
        "slurm.account=mine",
        "slurm.qos=high",
        "slurm.cpus_per_task=8",
        "slurm.mem=500G",
        "slurm.signal_seconds=240",
        "slurm.sbatch=['--mail-type=END']",
        "slurm.setup=['module load cuda/13']",
        "slurm.environment=['NCCL_DEBUG=WARN','NOTE=two words','OPTIONS=a=1']",
        "slurm.max_stalled_starts=5",
    )
    assert bash_accepts(script)
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=mine",
        "#SBATCH --qos=high",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=500G",
        "#SBATCH --signal=USR1@240",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "#SBATCH --mail-type=END",
        f"#SBATCH --chdir={tmp_path}",
        f"RUN_DIR={tmp_path}/run",
        "export NCCL_DEBUG=WARN",
        "export NOTE='two words'",
        "export OPTIONS=a=1",
        "module load cuda/13",
        "MAX_STALLED_STARTS=5",
    ):
        assert line in script.splitlines(), line
    assert "--array" not in script
    assert "--constraint" not in script
    assert "--gpus-per-node" not in script_of(tmp_path, "slurm.gpus_per_node=0"), "a site may know no GPUs"


def test_a_plain_script_to_type_sbatch_with(tmp_path: Path) -> None:
    plain = TEMPLATE.read_text()
    assert bash_accepts(plain)
    # The settings of the plain file are those that are rendered.
    head, body = plain[: plain.index(LINE)], plain[plain.index(LINE) :]
    rendered = script_of(tmp_path)
    assert rendered.endswith(body)

    def names(text: str) -> set[str]:
        return {line.split("=")[0] for line in text.splitlines() if "=" in line and not line.startswith("#")}

    assert names(head) == names(rendered[: rendered.index(LINE)])


def test_containers(tmp_path: Path) -> None:
    image = "slurm.container_image=/images/torch.sif"
    apptainer = script_of(tmp_path, "slurm.container=apptainer", image, "slurm.container_mounts=[/data]")
    assert bash_accepts(apptainer)
    line = next(line for line in apptainer.splitlines() if line.startswith("CONTAINER="))
    assert line.startswith("CONTAINER=(apptainer exec --nv ")
    assert f"--bind {tmp_path}/run " in line
    assert "--bind /data " in line
    assert line.endswith("/images/torch.sif)")
    assert "PYTHON=python" in apptainer.splitlines()
    enroot = script_of(tmp_path, "slurm.container=enroot", "slurm.container_image=/images/torch.sqsh")
    assert bash_accepts(enroot)
    line = next(line for line in enroot.splitlines() if line.startswith("SRUN="))
    assert "--container-image=/images/torch.sqsh" in line
    assert f"{tmp_path}/run:{tmp_path}/run" in line
    mounts = ["slurm.container=enroot", image, "slurm.container_mounts=['/data:/corpus:ro']", "run_dir=a/b", "seed=0,1"]
    line = next(line for line in script_of(tmp_path, *mounts).splitlines() if line.startswith("SRUN="))
    assert ",/data:/corpus:ro " in line, "as the site wrote it"
    assert all(f"{tmp_path}/a/b/seed-{seed}:" in line for seed in (0, 1)), "every run of a sweep"


def test_a_sweep_gives_every_run_a_folder_of_its_own(tmp_path: Path) -> None:
    assert sweep(["a=1", "b=2,3", "c=x,y"]) == (
        ["a=1"],
        [("b=2", "c=x"), ("b=2", "c=y"), ("b=3", "c=x"), ("b=3", "c=y")],
    )
    submission = compose_submission([*BASE, "run_dir=run", "optim.lr=1e-3,2e-3", "seed=range(0,2)"], tmp_path)
    assert [run.run_dir.name for run in submission.runs] == [
        "optim.lr-0.001_seed-0",
        "optim.lr-0.001_seed-1",
        "optim.lr-0.002_seed-0",
        "optim.lr-0.002_seed-1",
    ]
    assert submission.folder == tmp_path / "run" / "slurm" / "submission-001"
    script = render(submission)
    assert bash_accepts(script)
    assert "#SBATCH --array=0-3" in script
    for run in submission.runs:
        config = compose_config(run.overrides)
        assert tmp_path / config.run_dir == run.run_dir
        assert f"optim.lr-{config.optim.lr}_seed-{config.seed}" == run.run_dir.name
    named = compose_submission([*BASE, "seed=0,1", "run_dir='runs/${seed}'"], tmp_path)
    assert [run.run_dir for run in named.runs] == [tmp_path / "runs" / "0", tmp_path / "runs" / "1"]
    shuffled = compose_submission([*BASE, "run_dir=run", "seed=shuffle(range(0,20))"], tmp_path)
    for run in shuffled.runs:
        assert run.run_dir.name == f"seed-{compose_config(run.overrides).seed}"
    assert not compose_submission([*BASE, "seed=choice(3)"], tmp_path).is_array


@pytest.mark.parametrize(
    ("run_dir", "folder"),
    [
        ("'runs/${now:%H-%M-%S-%f}'", None),  # as at the submission, at whatever time the job composes it
        ("runs/a", "runs/a"),
        ("'läufe/ü'", "läufe/ü"),
        ("'my run, (1)'", "my run, (1)"),
        ('"it\'s $HOME `x` # {}"', "it's $HOME `x` # {}"),
        ("001", "001"),
    ],
)
def test_the_job_trains_in_the_folder_that_was_submitted(tmp_path: Path, run_dir: str, folder: str | None) -> None:
    submission = compose_submission([*BASE, f"run_dir={run_dir}"], tmp_path)
    [run] = submission.runs
    assert tmp_path / compose_config(run.overrides).run_dir == run.run_dir
    assert folder is None or run.run_dir == tmp_path / folder
    settings = render(submission).split(LINE)[0] + '\nprintf "%s\\n" "$RUN_DIR" "${OVERRIDES[@]}"'
    read = subprocess.run(["bash"], input=settings, capture_output=True, text=True, env={"SLURM_JOB_ID": "7"})
    assert read.stdout.splitlines() == [str(run.run_dir), *run.overrides], read.stderr


def test_the_site_of_the_environment_reaches_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAMBA_TRAIN_SITE", "example_site")
    overrides = [*BASE, "run_dir=run"]
    submission = compose_submission(overrides, tmp_path)
    assert submission.slurm.partition == "gpu"
    assert submission.runs[0].overrides[0] == "slurm=example_site"
    assert "module load cuda" in render(submission)
    assert compose_submission(["slurm=default", *overrides], tmp_path).slurm.partition is None, "what is typed counts"
    monkeypatch.delenv("MAMBA_TRAIN_SITE")
    assert compose_submission(overrides, tmp_path).slurm.partition is None


def test_each_run_of_a_sweep_that_needs_something_else_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ["slurm.nodes=1", "engine=ddp", "training.global_batch_size=64", "data.sequence_length=2048"]
    swept = ["model=mamba_tiny,mamba_2.8b", "engine.recompute=none", "seed=0,1", "run_dir=run"]
    submission = compose_submission([*overrides, *swept], tmp_path)
    with pytest.raises(SystemExit):
        plan(submission)
    shown = capfd.readouterr()
    assert [line for line in shown.out.splitlines() if line.startswith("plan of ")] == [
        f"plan of {tmp_path}/run/model-{model}_seed-0:" for model in ("mamba_tiny", "mamba_2.8b")
    ]
    assert "error: engine.name=ddp: the run needs" in shown.err


def test_a_vocabulary_of_another_size_is_planned_and_another_seed_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[list[str]] = []

    def run(command: list[str], *, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        assert env["PYTHONPATH"].split(":")[0] == str(REPOSITORY), "wherever it is started from"
        planned.append([word for word in command if word.startswith("data.vocab_size=")])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("slurm.submit.subprocess.run", run)
    plan(compose_submission([*BASE, "run_dir=run", "data.vocab_size=300,400", "seed=0,1"], tmp_path))
    assert planned == [["data.vocab_size=300"], ["data.vocab_size=400"]]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("slurm.nodes=null", "slurm.nodes has no value"),
        ("engine=single", "engine.name=single: it trains on one device"),
        ("training.global_batch_size=6", "expected a multiple of 4 processes"),
        ("checkpoint.resume=false", "checkpoint.resume=False"),
        ("slurm.time=soon", "slurm.time=soon: expected MINUTES"),
        ("slurm.time=2", "slurm.signal_seconds=180: expected less than slurm.time (2)"),
        ("slurm.environment=[A]", "slurm.environment=['A']: expected entries of the form NAME=VALUE"),
        ("slurm.sbatch=[x]", "slurm.sbatch=['x']: expected options of sbatch"),
        ("slurm.container_image=x", "slurm.container and slurm.container_image go together"),
        ("slurm.partition=a,b,", "cannot read the command line"),
        ("slurm.max_stalled_starts=0", "slurm.max_stalled_starts=0: expected more than 0"),
        ("slurm.account='a\nb'", r"slurm.account='a\nb': expected one line of text"),
        ("slurm.sbatch=['--mem=1\nls']", "expected one line of text"),
        ("slurm.time='86400'", "slurm.time=86400: these are minutes; write so long a time as DAYS-HOURS"),
        (
            "slurm.cpus_per_task=1,2",
            "slurm.cpus_per_task: 1 and 2 in one sweep, which is one job array with the same slurm.*",
        ),
        ("slurm.partition=a,b", "or quote a list: \"slurm.partition='A,B'\""),
        ("seed=0,0", "/run/seed-0: two runs of the sweep have the same folder"),
        ("seed=range(0,0)", "seed=range(0,0): there is no value in it"),
        ("optim.lr=interval(0,1)", "optim.lr=interval(0,1): expected the values themselves, as optim.lr=A,B,C"),
        ("model=glob(*)", "model=glob(*): expected the values themselves"),
        ("run_dir='50%'", "expected a path without '%'"),
        ("run_dir='a\\b'", r"expected a path without '\\'"),
        ("run_dir='a\"b'", "expected a path without '\"'"),
        ("run_dir='a\nb'", r"expected a path without '\n'"),
        (
            "slurm.environment=['WANDB_API_KEY=0123']",
            "WANDB_API_KEY in slurm.environment or slurm.setup",
        ),
        ("slurm.setup=['export A=1 HF_TOKEN=\"0123\"']", "HF_TOKEN in slurm.environment or slurm.setup"),
    ],
)
def test_mistakes(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        compose_submission([*BASE, "run_dir=run", override], tmp_path)
    assert expected in str(caught.value)
    assert "0123" not in str(caught.value)


def test_a_node_without_gpus_has_one_process(tmp_path: Path) -> None:
    assert "#SBATCH --ntasks-per-node=1" in script_of(tmp_path, "slurm.gpus_per_node=0").splitlines()
    with pytest.raises(ValueError, match=r"slurm.nodes=2 with slurm.gpus_per_node=0 starts 2 processes"):
        script_of(tmp_path, "slurm.gpus_per_node=0", "engine=single")


def test_a_key_that_is_swept_and_given_again(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seed=0,1: seed is given more than once"):
        compose_submission([*BASE, "run_dir=run", "seed=0,1", "seed=5"], tmp_path)


def test_a_credential_that_is_read_when_the_job_runs(tmp_path: Path) -> None:
    setup = ["export HF_TOKEN=$(cat ~/.token)", 'export WANDB_API_KEY="$KEY"', "TOKENIZERS_PARALLELISM=false"]
    assert setup[0] in script_of(tmp_path, f"slurm.setup={setup!r}")


def test_the_code_is_not_copied_into_itself() -> None:
    for run_dir in ("run_dir=a,b", "run_dir=."):
        with pytest.raises(ValueError, match="that is the repository; choose a folder below it"):
            compose_submission([*BASE, run_dir], REPOSITORY)


def test_a_site_that_is_not_yaml_is_one_clear_line(repository: Path, tmp_path: Path) -> None:
    for name in ("conf", "mamba_train", "slurm", "kernels"):
        shutil.copytree(repository / name, tmp_path / name)
    (tmp_path / "train.py").write_text((repository / "train.py").read_text())
    (tmp_path / "conf" / "slurm" / "mine.yaml").write_text("partition: [\n")
    for command in (["-m", "slurm.submit", "--dry-run"], ["train.py"]):
        result = subprocess.run(
            [sys.executable, *command, *BASE, "slurm=mine"],
            cwd=tmp_path,
            env={**environment(), "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert "conf/slurm/mine.yaml" in result.stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-0", 172800),
        ("1-12:00:00", 129600),
        ("1-02:03", 93780),
        ("x", None),
        ("", None),
        ("-5", None),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int | None) -> None:
    assert seconds_of(text) == seconds


def test_the_command_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**environment(), "PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-m", "slurm.submit", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)

    shown = run("--dry-run", *BASE)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("#!/bin/bash\n#SBATCH")
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"
    assert run(*BASE[:2], "--dry-run", *BASE[2:]).stdout == shown.stdout, "an option may stand anywhere"
    refused = run(*BASE, "model.d_modl=3")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "did you mean model.d_model?" in refused.stderr


def test_a_rank_that_dies_takes_the_others_with_it() -> None:
    # NCCL does not notice by itself within seconds, as gloo does in the tests on a cluster.
    assert "\nsrun --kill-on-bad-exit=1 " in TEMPLATE.read_text()
