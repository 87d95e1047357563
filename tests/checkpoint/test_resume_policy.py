import dataclasses
import enum

import pytest

from mamba_train.checkpoint import resume_policy
from mamba_train.checkpoint.resume_policy import Action, Change, apply, check_shapes, compare
from mamba_train.config import Config


def _leaves(kind: type, prefix: str = "") -> list[str]:
    names = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            names += _leaves(field.type, f"{prefix}{field.name}.")
        else:
            names.append(prefix + field.name)
    return names


LEAVES = _leaves(Config)


def test_the_schema_is_walked_to_its_leaves():
    assert {"seed", "run_dir", "model.d_model", "training.total_steps"} <= set(LEAVES)
    assert not {"model", "training"} & set(LEAVES)


@pytest.mark.parametrize("key", LEAVES)
def test_every_key_of_the_schema_has_exactly_one_rule(key):
    assert len(resume_policy.rules_for(key)) == 1, "add a rule to mamba_train/checkpoint/resume_policy.py"


@pytest.mark.parametrize("rule", resume_policy.RULES, ids=lambda rule: rule.pattern)
def test_every_rule_is_for_some_key(rule):
    assert any(rule in resume_policy.rules_for(key) for key in LEAVES)


def test_the_table_is_documented():
    assert len(resume_policy.table()) == len(resume_policy.RULES)
    assert all(len(reason) > 10 for _, _, reason in resume_policy.table())


@pytest.mark.parametrize(
    ("key", "action"),
    [
        ("training.total_steps", "warn"),
        ("schedule.kind", "warn"),
        ("optim.lr", "warn"),
        ("training.global_batch_size", "warn"),
        ("training.micro_batch_size", "allow"),
        ("logging.wandb", "allow"),
        ("checkpoint.keep_last", "allow"),
        ("engine.name", "warn"),
        ("seed", "refuse"),
        ("model.d_model", "refuse"),
        ("data.sequence_length", "refuse"),
        ("data.source", "allow"),
        ("data.mixture", "allow"),
        ("data.sources.pile", "allow"),
        ("something.new", "refuse"),
    ],
)
def test_actions(key, action):
    *groups, leaf = key.split(".")
    old, new = {leaf: 1}, {leaf: 2}
    for group in reversed(groups):
        old, new = {group: old}, {group: new}
    [change] = compare(old, new)
    assert (change.key, change.old, change.new, change.action.value) == (key, 1, 2, action)


@pytest.mark.parametrize(
    ("key", "reader"),
    [
        ("reshard_after_forward", "fsdp"),
        ("reduce_each_micro_batch", "fsdp"),
        ("replicas", "fsdp"),
        ("cuda_graphs", "fsdp"),
        ("zero_stage", "deepspeed"),
        ("kernel_cache", None),
        ("layer_grad_norms", None),
    ],
)
def test_what_the_engine_does_not_read_is_no_news(key, reader):
    engines = ["single", "ddp", "fsdp", "deepspeed"]
    for before in engines:
        for after in engines:
            changes = compare({"engine": {"name": before, key: 1}}, {"engine": {"name": after, key: 2}})
            [of_key] = [change for change in changes if change.key == f"engine.{key}"]
            assert (of_key.action is Action.warn) == (reader in (before, after))


def test_graphs_are_news_where_they_change_bits():
    """Where null becomes false depends on the number of micro-batches, and on the version: no bit changes by it."""
    for name, before, after, action in (
        ("fsdp", None, False, Action.allow),
        ("fsdp", False, None, Action.allow),
        ("fsdp", None, True, Action.warn),
        ("fsdp", True, False, Action.warn),
        ("ddp", None, True, Action.allow),
        ("single", False, True, Action.allow),
    ):
        [change] = compare(*({"engine": {"name": name, "cuda_graphs": value}} for value in (before, after)))
        assert change.action is action, (name, before, after)


class _Kind(enum.StrEnum):
    cosine = "cosine"


def test_equal_configs_have_no_changes():
    old = {"schedule": {"kind": "cosine", "betas": [0.9, 0.95]}, "seed": 1, "model": {}}
    new = {"schedule": {"kind": _Kind.cosine, "betas": (0.9, 0.95)}, "seed": 1, "model": {}}
    assert compare(old, new) == []


def test_a_key_that_appears_or_disappears_is_a_change():
    changes = compare({"model": {"old_key": None}}, {"model": {"new_key": 5}, "logging": {"x": 1}})
    assert [(c.key, c.old, c.new) for c in changes] == [
        ("logging.x", "(absent)", 1),
        ("model.new_key", "(absent)", 5),
        ("model.old_key", None, "(absent)"),
    ]


def test_a_group_that_becomes_a_value_is_a_change():
    assert [c.key for c in compare({"model": {"a": 1}}, {"model": None})] == ["model", "model.a"]


def test_one_line_lists_all_that_is_refused():
    old = {"model": {"d_model": 128, "n_layer": 4}, "optim": {"lr": 0.1}, "seed": 0}
    new = {"model": {"d_model": 256, "n_layer": 4}, "optim": {"lr": 0.2}, "seed": 1}
    lines: list[str] = []
    with pytest.raises(ValueError, match="d_model") as caught:
        apply(compare(old, new), lines.append)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("model.d_model was 128, is 256", "seed was 0, is 1", "run_dir", "checkpoint.resume=false"):
        assert part in message
    assert "optim.lr" not in message
    assert lines == []


def test_warnings_are_logged_and_allowed_changes_are_not():
    old = {"optim": {"lr": 0.1}, "logging": {"wandb": "auto"}, "training": {"total_steps": 500}}
    new = {"optim": {"lr": 0.2}, "logging": {"wandb": "offline"}, "training": {"total_steps": 800}}
    lines: list[str] = []
    apply(compare(old, new), lines.append)
    assert len(lines) == 2
    assert lines[0].startswith("resuming with optim.lr=0.2 instead of 0.1: ")
    assert lines[1].startswith("resuming with training.total_steps=800 instead of 500: ")


def test_no_change_is_no_news():
    apply([], pytest.fail)
    apply([Change("run_dir", "a", "b", Action.allow, "moved")], pytest.fail)


def test_shapes():
    saved = {"a.weight": (2, 3), "b": (4,), "c": ()}
    check_shapes(saved, {"a.weight": (2, 3), "b": [4], "c": []})
    with pytest.raises(ValueError, match="another model") as caught:
        check_shapes(saved, {"a.weight": (2, 5), "b": (4,), "d": (1,), "c": ()})
    message = str(caught.value)
    assert "\n" not in message
    assert "2 of 4 parameters differ, first 'a.weight', (2, 3) in the checkpoint and (2, 5) here" in message


def test_missing_and_superfluous_parameters():
    with pytest.raises(ValueError, match=r"1 of 2 .* first 'b', \(absent\) in the checkpoint and \(1,\) here"):
        check_shapes({"a": (1,)}, {"a": (1,), "b": (1,)})
    with pytest.raises(ValueError, match=r"1 of 1 .* first 'a', \(1,\) in the checkpoint and \(absent\) here"):
        check_shapes({"a": (1,)}, {})
