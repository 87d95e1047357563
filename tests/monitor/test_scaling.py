"""The fit is the power law that the runs follow."""

from pathlib import Path

import pytest

from mamba_train.monitor.report import write_report
from mamba_train.monitor.run_record import RunRecord
from mamba_train.monitor.scaling import ScalingPoint, fit, scaling_points

from .runs import write_run


def run_of(parameters: int, tokens: float, loss: float | None) -> RunRecord:
    record = {"step": 1, "tokens": tokens, "validation/loss": loss}
    return RunRecord(f"run-{parameters}", Path(), [record], summary={"n_parameters": parameters})


def test_the_power_law_is_found_again() -> None:
    runs = [run_of(n, 20 * n, 30 * (120 * n * n) ** -0.05) for n in (10**9, 10**7, 10**8)]
    points = scaling_points([*runs, run_of(10**6, 1e6, None)])
    assert [point.name for point in points] == ["run-10000000", "run-100000000", "run-1000000000"]
    assert points[0].flops == 6 * 10**7 * 20 * 10**7
    law = fit(points)
    assert law is not None
    assert (law.factor, law.exponent) == pytest.approx((30, -0.05), rel=1e-9)
    assert law.error == pytest.approx(0, abs=1e-9)
    assert law(1e20) == pytest.approx(30 * 1e20**-0.05)


def test_two_runs_make_no_law() -> None:
    points = [ScalingPoint("a", 1e18, 3.0), ScalingPoint("b", 1e19, 2.5)]
    assert fit(points) is None
    assert fit([*points, ScalingPoint("c", 1e19, 2.6)]) is None


def test_the_report_of_three_runs_draws_it(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{n}", n_steps=20 * n, health=False) for n in (1, 2, 3)]
    report = write_report(runs, tmp_path / "out")
    assert "loss against compute, 3 runs" in report.lines[-1]
    assert "Loss against compute" in report.html_path.read_text()
    assert not any("against compute" in line for line in write_report(runs[:2], tmp_path / "two").lines)
