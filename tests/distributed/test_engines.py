"""What each engine promises, looked at from inside its ranks (checks.py)."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mamba_train.model.initialise import draw
from tests.distributed.engine_in_rank import MODEL
from tests.distributed.launch import TOPOLOGIES, child_environment, torchrun
from tests.distributed.test_parity import OTHERS, skip_without

CHECKS = Path(__file__).with_name("checks.py")


def check(name: str, *overrides: str) -> dict[str, Any]:
    topology = TOPOLOGIES[name]
    command = torchrun(topology.processes, str(CHECKS), *topology.overrides, *overrides)
    result = subprocess.run(command, env=child_environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    line = next(line for line in result.stdout.splitlines() if line.startswith("FOUND "))
    found: dict[str, Any] = json.loads(line.removeprefix("FOUND "))
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "fsdp x 2" else pytest.mark.slow) for name in OTHERS]
)
def test_the_contract_holds_and_the_audit_sees_when_it_does_not(name: str) -> None:
    skip_without(name)
    found = check(name)
    import torch

    from mamba_train.model.language_model import MambaLM

    with torch.device("meta"):
        shapes = {n: p.shape for n, p in MambaLM(MODEL).named_parameters()}
    assert found["start"] == {n: draw(n, shape, MODEL, 0).double().sum().item() for n, shape in shapes.items()}
    parts = {"ddp x 2": 1, "fsdp x 4": 4, "zero-2 x 4": 4}.get(name, 2)
    assert found["share"] == pytest.approx(1 / parts, rel=0.1), "of weights and moments on one rank"
    assert found["clean"] == found["clean in bf16"] == ""
    for kind, said in found["wrong_initial_values"].items():
        assert "ssm.dt_bias" in said, kind
    for parameter, said in found["rounded"].items():
        assert "reaches the scan" in said, parameter
        assert "layers.0.mixer.ssm." in said
    assert found["rounded on the last rank"] == "stopped"
    assert "A_log has weight decay" in found["misplaced"]
    assert found["D after the audit"] == 1.0
    before, doubled, after = found["losses by weights"]
    assert before == after != doubled, "a pass computes with weights that were replaced"
    assert found["lost"] == [], "gradients are not summed in fp32"
    assert found["accumulation"] < 1e-5
    (summed_once, summed_thrice), (gathered_twice, gathered_once, kept_for_all) = found["traffic"].values()
    if not name.startswith("zero"):  # ZeRO-2 and 3 cannot but sum after each micro-batch
        assert summed_once == summed_thrice > 0
    if name.startswith(("fsdp", "hsdp")):
        assert gathered_twice > gathered_once == kept_for_all > 0
    assert found["changed by keeping"] == []
    assert max(found["recomputed"].values()) < 1e-6
    assert found["scans"] == {"scan": 2 * MODEL.n_layer, "layer": 2 * MODEL.n_layer, "keep_scan": MODEL.n_layer}
    assert found["scans with one layer recomputed"] == MODEL.n_layer + 1
    assert found["clipped_norm"] == pytest.approx(0.5, rel=1e-3)
    norms = found["layer_norms"]
    assert norms.keys() == {"embedding", "layer_00", "layer_01", "norm", "all"}
    assert norms["all"] == pytest.approx(math.sqrt(sum(v**2 for k, v in norms.items() if k != "all")), rel=1e-4)
    assert norms["layer_00"] != pytest.approx(norms["layer_01"], rel=1e-3)
    for skip in (found["skip"], found["skip in bf16"]):
        assert skip["skipped"]
        assert skip["changed"] == []
        assert skip["next_is_finite"]
        assert skip["moved"]
    assert found["skip"]["after"] == found["undisturbed"], "a skipped step leaves something behind"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp x 2", "fsdp x 2", "zero-1 x 2", "zero-3 x 2"])
def test_a_sum_in_bf16_loses_small_gradients(name: str) -> None:
    """What the check of the sum would see if it were not fp32: here on purpose."""
    skip_without(name)
    lost = check(name, "engine.reduce_precision=bf16")["lost"]
    assert "layers.0.mixer.in_proj.weight" in lost
