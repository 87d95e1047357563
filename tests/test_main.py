"""The command line of `mamba-train` as a whole."""

import sys

import pytest

from mamba_train.__main__ import main
from mamba_train.commands import plan


@pytest.mark.parametrize(
    "words",
    [["engine=ddp", "--gpus", "2", "model=mamba_130m"], ["--gpus", "2", "engine=ddp", "model=mamba_130m"]],
    ids=["on both sides", "after"],
)
def test_overrides_may_stand_on_either_side_of_an_option(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    seen = []
    monkeypatch.setattr(plan, "run", seen.append)
    monkeypatch.setattr(sys, "argv", ["mamba-train", "plan", *words])
    main()
    assert seen[0].overrides == ["engine=ddp", "model=mamba_130m"]
    assert seen[0].gpus == 2


@pytest.mark.parametrize("words", [["plan", "--gpu-count", "2"], ["report", "run", "--out", "x", "--nonsense"]])
def test_unknown_words_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mamba-train", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
