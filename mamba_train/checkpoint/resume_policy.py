"""What may change when a run goes on from a checkpoint: one rule for every key of the config.

A key without a rule may not change, so a new setting is safe until someone has thought about it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from mamba_train.config import EngineKind


class Action(StrEnum):
    """What happens when a key has another value than in the checkpoint."""

    allow = "allow"
    warn = "warn"
    refuse = "refuse"


@dataclass(frozen=True)
class Rule:
    """One row of the table; `*` in the pattern stands for any text."""

    pattern: str
    action: Action
    reason: str
    engine: EngineKind | None = None  # the only one that reads the key; None: all do
    alike: tuple[Any, ...] = ()  # values that compute the same bits


@dataclass(frozen=True)
class Change:
    """A key whose value differs; `ABSENT` stands for a key that one of the configs does not have."""

    key: str
    old: Any
    new: Any
    action: Action
    reason: str


ABSENT = "(absent)"
_REMEDY = "to go on set it back; else choose another run_dir, or start over with checkpoint.resume=false"
_UNLISTED = "no rule says that it may change"

_OTHER_MODEL = "the checkpoint holds the weights of another model"
_SAME_TOKENS = "the prepared tokens are compared by their fingerprint"
_BAD_DOCUMENTS = "prepared tokens are compared by their fingerprint; places in a stream count what is left out, too"
_OTHER_OPTIMISER = "holds from the resumed step on; the optimiser's moments are kept"
_OTHER_SCHEDULE = "the learning rate of the steps that remain follows the new schedule"
_OTHER_ARITHMETIC = "the losses agree within rounding, no longer bit by bit"

RULES: tuple[Rule, ...] = (
    Rule("model.*", Action.refuse, _OTHER_MODEL),
    Rule("data.name", Action.allow, _SAME_TOKENS),
    Rule("data.source", Action.allow, _SAME_TOKENS),
    Rule("data.path", Action.allow, _SAME_TOKENS),
    Rule("data.text_key", Action.allow, _SAME_TOKENS),
    Rule("data.bad_documents", Action.allow, _BAD_DOCUMENTS),
    Rule("data.max_bad_share", Action.allow, _BAD_DOCUMENTS),
    Rule("data.tokenizer", Action.allow, _SAME_TOKENS),
    Rule("data.vocab_size", Action.allow, _SAME_TOKENS),
    Rule("data.validation_fraction", Action.allow, _SAME_TOKENS),
    Rule("data.sequence_length", Action.refuse, "samples are counted in sequences of this length"),
    Rule("data.reset_state_at_documents", Action.refuse, "the model would see another context than so far"),
    Rule("data.cache_dir", Action.allow, _SAME_TOKENS),
    Rule("data.check_hashes", Action.allow, _SAME_TOKENS),
    Rule("data.sources*", Action.allow, _SAME_TOKENS),
    Rule("data.mixture", Action.allow, "only for steps to come: the steps that are done are compared"),
    Rule(
        "data.validation_paths*",
        Action.warn,
        "validation losses before and after are of different text and decide together what is the best",
    ),
    Rule("data.mask_loss_at_documents", Action.warn, "losses before and after are of different targets"),
    Rule("data.workers", Action.allow, "the order of the data does not depend on it"),
    Rule("data.prefetch_batches", Action.allow, "the order of the data does not depend on it"),
    Rule("data.task*", Action.allow, _SAME_TOKENS),
    Rule("data.test_*", Action.allow, "does not touch the training"),
    Rule("data.allow_changed", Action.allow, "it decides about the tokens, and what it allowed is recorded"),
    Rule("data.lanes", Action.allow, _SAME_TOKENS),
    Rule("data.repeat", Action.allow, _SAME_TOKENS),
    Rule("data.shuffle_*", Action.allow, _SAME_TOKENS),
    Rule("data.continue_lanes", Action.allow, "it only checks the other settings"),
    Rule("data.cache_shards", Action.allow, "the order of the data is compared with the checkpoint's"),
    Rule("data.cache_group_mib", Action.allow, _SAME_TOKENS),
    Rule("data.cache_workers", Action.allow, "the order of the data does not depend on it"),
    Rule("data.encoder", Action.allow, "the ids are those of the reference, or the run stops"),
    Rule("data.network_*", Action.allow, "the order of the data does not depend on it"),
    Rule("data.hub_*", Action.allow, _SAME_TOKENS),
    Rule("optim.*", Action.warn, _OTHER_OPTIMISER),
    Rule("schedule.*", Action.warn, _OTHER_SCHEDULE),
    Rule("engine.name", Action.warn, _OTHER_ARITHMETIC),
    Rule("engine.device", Action.warn, _OTHER_ARITHMETIC),
    Rule("engine.precision", Action.warn, _OTHER_ARITHMETIC),
    Rule("engine.compile", Action.warn, _OTHER_ARITHMETIC),
    # null is recorded as false where it finds that graphs would change bits, which depends on other keys.
    Rule("engine.cuda_graphs", Action.warn, _OTHER_ARITHMETIC, EngineKind.fsdp, alike=(None, False)),
    Rule("engine.recompute*", Action.warn, _OTHER_ARITHMETIC),
    Rule("engine.reduce_precision", Action.warn, _OTHER_ARITHMETIC),
    Rule("engine.zero_stage", Action.warn, _OTHER_ARITHMETIC, EngineKind.deepspeed),
    Rule("engine.replicas", Action.warn, _OTHER_ARITHMETIC, EngineKind.fsdp),
    Rule("engine.reshard_after_forward", Action.warn, _OTHER_ARITHMETIC, EngineKind.fsdp),
    Rule("engine.reduce_each_micro_batch", Action.warn, _OTHER_ARITHMETIC, EngineKind.fsdp),
    Rule("engine.layer_grad_norms", Action.allow, "does not touch the training"),
    Rule("engine.kernel_cache", Action.allow, "does not touch the training"),
    Rule("logging.*", Action.allow, "does not touch the training"),
    Rule("checkpoint.*", Action.allow, "does not touch the training"),
    Rule("training.total_steps", Action.warn, _OTHER_SCHEDULE),
    Rule(
        "training.global_batch_size",
        Action.warn,
        "the data goes on from the samples consumed; steps and the schedule count other amounts of tokens",
    ),
    Rule("training.micro_batch_size", Action.allow, "the global batch is the same, only cut differently"),
    Rule("training.validation_interval_steps", Action.allow, "does not touch the training"),
    Rule(
        "training.validation_sequences",
        Action.warn,
        "validation losses before and after are of different text and decide together what is the best",
    ),
    Rule("guard.*", Action.warn, "steps to come are judged by other bounds"),
    Rule("watchdog.*", Action.allow, "does not touch the training"),
    Rule("alerts.*", Action.allow, "does not touch the training"),
    Rule("evaluation.*", Action.allow, "does not touch the training"),
    Rule("slurm.*", Action.allow, "where a run is planned for, not what it computes"),
    Rule("seed", Action.refuse, "the order of the data depends on it"),
    Rule("init_from", Action.warn, "counts at step 0 only: the run goes on with its checkpoint's weights"),
    Rule("run_dir", Action.allow, "a run folder may be moved"),
)


def table() -> list[tuple[str, str, str]]:
    """Rows (key pattern, action, reason) of the table, for the documentation."""
    return [(rule.pattern, rule.action.value, rule.reason + _except(rule)) for rule in RULES]


def _except(rule: Rule) -> str:
    limits = [f"engine={rule.engine} only"] if rule.engine else []
    if rule.alike:
        limits.append("not between " + " and ".join(_show(value) for value in rule.alike))
    return f" ({', '.join(limits)})" if limits else ""


def rules_for(key: str) -> list[Rule]:
    """Rules whose pattern matches a dotted key; for every key of the schema exactly one."""
    return [rule for rule in RULES if fnmatchcase(key, rule.pattern)]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def compare(old_config: Mapping[str, Any], new_config: Mapping[str, Any]) -> list[Change]:
    """Every difference between a checkpoint's config and the one of this start, in the order of the keys.

    Both are nested dicts of plain values; enums and tuples count as what JSON makes of them. What neither engine reads
    may change.
    """
    old, new = (_leaves(json.loads(json.dumps(config))) for config in (old_config, new_config))
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, ABSENT), new.get(key, ABSENT)
        if before != after:
            rule = next(iter(rules_for(key)), Rule(key, Action.refuse, _UNLISTED))
            is_read = rule.engine is None or rule.engine in (old.get("engine.name"), new.get("engine.name"))
            matters = is_read and not (before in rule.alike and after in rule.alike)
            changes.append(Change(key, before, after, rule.action if matters else Action.allow, rule.reason))
    return changes


def apply(changes: Sequence[Change], log: Callable[[str], None]) -> None:
    """Report the changes that deserve a warning; raise ValueError, in one line, for those not allowed."""
    refused = [change for change in changes if change.action is Action.refuse]
    if refused:
        listed = "; ".join(f"{c.key} was {_show(c.old)}, is {_show(c.new)} ({c.reason})" for c in refused)
        raise ValueError(f"the checkpoint cannot be resumed with this config: {listed}; {_REMEDY}")
    for c in changes:
        if c.action is Action.warn:
            log(f"resuming with {c.key}={_show(c.new)} instead of {_show(c.old)}: {c.reason}")


def _show(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value)


def check_shapes(saved: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError, in one line, unless a checkpoint's weights have a model's names and shapes.

    Both map parameter names to shapes.
    """
    found = {name: tuple(shape) for name, shape in saved.items()}
    wanted = {name: tuple(shape) for name, shape in expected.items()}
    names = sorted(found.keys() | wanted.keys())
    mismatches = [name for name in names if found.get(name) != wanted.get(name)]
    if mismatches:
        first = mismatches[0]
        raise ValueError(
            f"the checkpoint is of another model: {len(mismatches)} of {len(names)} parameters differ, first "
            f"'{first}', {found.get(first, ABSENT)} in the checkpoint and {wanted.get(first, ABSENT)} here; "
            f"{_REMEDY}"
        )
