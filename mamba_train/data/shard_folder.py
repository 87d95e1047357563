"""Whose job a folder of shards is: `job.json` holds the plan, and whoever comes with another plan is refused.

Two things may have changed when a command is given again, both of which messages advise. More documents may be left
out than so far, because what is finished was made without leaving out as many; and an input that no finished group has
read may have another size: it was repaired. Everything finished then has the bytes that the new plan gives it.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mamba_train.data.documents import Log
from mamba_train.data.manifest import TOKENIZER_NAME
from mamba_train.data.shard_group import GROUPS_FOLDER, read_entry
from mamba_train.data.shard_job import JOB_NAME, Job, JobSettings, create_once
from mamba_train.data.shards import replace_durably
from mamba_train.data.tokenizer import TextTokenizer


def adopt_folder(folder: Path, job: Job, tokenizer: TextTokenizer, log: Log, option: str = "--output") -> None:
    """Make the folder that of this job, or check that it is. Raises ValueError that begins with `option`."""
    path = folder / JOB_NAME
    # In this order: another task may make the folder that of this job at any moment, and job.json comes first in it.
    has_files = folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir())
    if has_files and not path.exists():
        raise ValueError(f"{option} {folder}: the folder is not empty and holds no {JOB_NAME}; choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option} {folder}: cannot be made ({error.strerror})") from error
    if not path.exists():
        create_once(path, job.to_json().encode("utf-8"))
    begun = read_job(folder)
    changes = _allowed_changes(folder, begun, job)
    difference = _difference(json.loads(begun.to_json()), json.loads(job.to_json()), allowed=changes)
    if difference is not None:
        raise ValueError(
            f"{option} {folder}: the folder was begun with other inputs or settings ({difference}); repeat those, "
            f"or choose another folder{'' if _has_entries(folder) else ', or remove this one: no group is finished'}"
        )
    if begun != job:
        for change in changes.values():
            log(f"{option} {folder}: goes on with {change}")
        replace_durably(path, job.to_json().encode("utf-8"))
    if not (folder / TOKENIZER_NAME).exists():
        create_once(folder / TOKENIZER_NAME, tokenizer.serialised)


def _has_entries(folder: Path) -> bool:
    return (folder / GROUPS_FOLDER).is_dir() and any((folder / GROUPS_FOLDER).iterdir())


def read_job(folder: Path) -> Job:
    """The plan in a folder. Raises ValueError that names the file."""
    path = folder / JOB_NAME
    try:
        return Job.from_json(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable plan ({error}); choose another folder") from error


def _allowed_changes(folder: Path, begun: Job, job: Job) -> dict[str, str]:
    """What of a plan may differ from the one that the folder was begun with: the key, and the change in words."""
    changes: dict[str, str] = {}
    before, now = begun.settings, job.settings
    if _share_left_out(before) <= _share_left_out(now):
        for key in ("bad_documents", "max_bad_share"):
            if (old := getattr(before, key)) != (new := getattr(now, key)):
                changes[f"settings.{key}"] = f"{key}={new}, begun with {old}"
    for number, (old_group, new_group) in enumerate(zip(begun.groups, job.groups, strict=False)):
        if old_group == new_group or read_entry(folder, old_group) is not None:
            continue
        for place, (old, new) in enumerate(zip(old_group.inputs, new_group.inputs, strict=False)):
            if old.size != new.size:
                change = f"{new.name} of {new.size:,} bytes, which had {old.size:,} when the folder was begun"
                changes[f"groups.{number}.inputs.{place}.size"] = change
    return changes


def _share_left_out(settings: JobSettings) -> float:
    """The largest share of a group's documents that may be left out."""
    return settings.max_bad_share if settings.bad_documents == "skip" else 0.0


def _difference(there: Any, here: Any, key: str = "", allowed: Collection[str] = ()) -> str | None:
    """The first place where two JSON values differ, in words; None if nowhere but at the `allowed` keys."""
    if isinstance(there, dict) and isinstance(here, dict) and there.keys() == here.keys():
        pairs: list[tuple[Any, Any, Any]] = [(name, there[name], here[name]) for name in here]
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = [(number, *pair) for number, pair in enumerate(zip(there, here, strict=True))]
    elif isinstance(there, list) and isinstance(here, list):
        return f"{key}: {len(there)} there, {len(here)} here"
    else:
        return None if there == here or key in allowed else f"{key}: {there!r} there, {here!r} here"
    differences = (_difference(a, b, f"{key}.{name}".lstrip("."), allowed) for name, a, b in pairs)
    return next((difference for difference in differences if difference is not None), None)
