"""The state of the data in a checkpoint: where the run is, and what gives that place its meaning.

It holds no order, no buffer and nothing per worker, so its size depends on the names of the sources and the
number of stages, not on steps, corpus or restarts.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from mamba_train.data.mixture import Stage, shares_of
from mamba_train.data.streams import Source

FINGERPRINT_DIGITS = 16
_NEW_RUN = "or start a new run with another run_dir"


def state_of(source: Source, samples: int) -> dict[str, Any]:
    """What a checkpoint keeps when `samples` samples have been consumed; JSON values."""
    return {
        "samples": samples,
        "seed": source.seed,
        "sequence_length": source.form.length,
        "order": source.order,
        "stages": [
            {"from_step": stage.from_step, "from_sample": stage.from_sample, "weights": dict(stage.weights)}
            for stage in source.mixture.stages
        ],
        "fingerprints": {name: source.fingerprint_of(name)[:FINGERPRINT_DIGITS] for name in source.names},
        # One entry for each time that data.allow_changed let other tokens take the place of these.
        "changes": source.changes,
        **source.own_state(),
    }


def restore(source: Source, state: Mapping[str, Any], step: int, allow_changed: bool) -> list[str]:
    """Make `source` go on from a saved state, `step` steps of the run being done.

    Returns the names of the sources whose tokens changed, which is allowed with `allow_changed` only and then goes
    into the state. Raises ValueError, one line, unless the samples consumed so far mean the same here as there.
    """
    if state.get("order", source.order) != source.order:
        raise ValueError(
            f"data.source: samples are ordered by {source.order} here, in the checkpoint by {state['order']}; "
            f"use the data.source and the version of the program that wrote it, {_NEW_RUN}"
        )
    missing = [key for key in state_of(source, 0) if key not in state]
    if missing:
        raise ValueError(f"the data state of the checkpoint has no {', '.join(missing)}: it cannot be continued")
    samples = state["samples"]
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 0:
        raise ValueError(f"the data state of the checkpoint has samples={samples!r}: expected a count")
    for key, mine, saved in (
        ("seed", source.seed, state["seed"]),
        ("data.sequence_length", source.form.length, state["sequence_length"]),
    ):
        if mine != saved:
            raise ValueError(f"{key}={mine}: the checkpoint was trained with {saved}; set {key}={saved}, {_NEW_RUN}")
    source.set_stages(_stages(source, state["stages"], step, samples))
    changed = _changed(source, state, step)
    if changed and not (allow_changed and source.may_change):
        raise ValueError(_explain_change(source, state, changed))
    source.load_own_state(state)
    source.changes = list(state["changes"])
    if changed:
        source.changes.append({"samples": samples, "sources": changed})
    return changed


def _stages(source: Source, saved: Sequence[Mapping[str, Any]], step: int, samples: int) -> list[Stage]:
    """The stages of the config, with the past as it was: the batch size may have been another one then."""
    past = [stage for stage in saved if stage["from_step"] < step]
    stages = source.mixture.stages
    mine = [(stage.from_step, stage.shares) for stage in stages if stage.from_step < step]
    theirs = [(stage["from_step"], shares_of(stage["weights"])) for stage in past]
    if mine != theirs:
        raise ValueError(
            f"data.mixture: {step} steps are done, which were fed by {_show(theirs)}, the config says {_show(mine)}; "
            f"only what begins from step {step} on may be changed: restore the stages before, {_NEW_RUN}"
        )
    began = [stage["from_sample"] for stage in past]
    began += [samples + (stage.from_step - step) * source.global_batch_size for stage in stages[len(past) :]]
    return [Stage(stage.from_step, start, stage.weights) for stage, start in zip(stages, began, strict=True)]


def _show(stages: Sequence[tuple[int, Mapping[str, Fraction]]]) -> str:
    def percents(shares: Mapping[str, Fraction]) -> str:
        return " + ".join(f"{100 * float(share):g}% {name or 'everything'}" for name, share in shares.items())

    return ", ".join(f"[from step {step}: {percents(shares)}]" for step, shares in stages)


def _changed(source: Source, state: Mapping[str, Any], step: int) -> list[str]:
    """The sources that have been read so far and do not have the tokens that they had."""
    read = {name for stage in source.mixture.stages if stage.from_step < step for name in stage.shares}
    saved = state["fingerprints"]
    return [name for name in sorted(read) if not source.is_same(name, saved.get(name, "none"))]


def _explain_change(source: Source, state: Mapping[str, Any], changed: Sequence[str]) -> str:
    name = changed[0]
    if not source.may_change:
        names = ", ".join(other or "data.path" for other in changed)
        return (
            f"the files of {names}, their sizes, data.tokenizer or a setting of the stream (data.repeat, "
            "data.shuffle_files, data.shuffle_documents, data.cache_group_mib, data.text_key) are "
            f"not the checkpoint's, so its places in the text mean nothing: restore them, {_NEW_RUN}"
        )
    mine, saved = source.fingerprint_of(name), state["fingerprints"].get(name, "none")
    what = (
        f"the shards, their order or the tokenizer of {', '.join(changed)} (data.sources, data.path) are"
        if name
        else "the text or tokenizer (data.source, data.path, data.sources, data.tokenizer, data.vocab_size, "
        "data.validation_fraction) is"
    )
    return (
        f"{what} not the checkpoint's (fingerprint {mine:.12}, saved {saved:.12}); restore it, go on with the changed "
        f"tokens by data.allow_changed=true, {_NEW_RUN}"
    )
