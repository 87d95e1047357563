"""From the command line to a checked `Config`, and from Hydra's errors to one clear line.

Nothing here imports torch, so that a mistake is reported in the time Hydra takes to compose.
"""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import hydra
import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mamba_train import ranks
from mamba_train.config import Config, register_schema
from mamba_train.config_checks import check_config

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
EXIT_USER_ERROR = 2


def to_config(composed: DictConfig, may_be_missing: Collection[str] = ()) -> Config:
    """Turn a composition into the typed `Config` and check what types cannot say.

    may_be_missing: keys that may have no value, or name a file that is not there; no value becomes None.
    Raises ValueError with the Hydra key, the value, and what would be accepted.
    """
    known = set(known_keys())
    for key in _dotted_keys(OmegaConf.to_container(composed)):
        if key not in known and not _open_parent(key):  # `+key=value` gets past Hydra
            raise ValueError(f"{key}: there is no such key{_nearest(key, known)}; see --help")
    missing = sorted(OmegaConf.missing_keys(composed))
    for key in may_be_missing:
        if key in missing:
            OmegaConf.update(composed, key, None)
            missing.remove(key)
    if missing:
        raise ValueError(f"{missing[0]} has no value; give one on the command line: {missing[0]}=VALUE")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, Config)
    _find_home(config)
    check_config(config, ignore=may_be_missing)
    return config


def _find_home(config: Config) -> None:
    """Put the home folder in the place of `~` where nothing later does: in quotes or in YAML no shell has done so."""
    config.run_dir = os.path.expanduser(config.run_dir)
    if config.evaluation.task_folder is not None:
        config.evaluation.task_folder = os.path.expanduser(config.evaluation.task_folder)
    slurm = config.slurm
    slurm.python = slurm.python and os.path.expanduser(slurm.python)
    slurm.container_image = slurm.container_image and os.path.expanduser(slurm.container_image)
    slurm.container_mounts = [os.path.expanduser(mount) for mount in slurm.container_mounts]


def compose_config(overrides: Iterable[str] = (), may_be_missing: Collection[str] = ()) -> Config:
    """Compose and check a config from overrides, as `main` does from a command line.

    Raises ValueError, in one line, for whatever is wrong with them; `may_be_missing` is that of `to_config`.
    """
    register_schema()
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return to_config(hydra.compose("config", overrides=list(overrides)), may_be_missing)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(explain(error)) from error


def main(run: Callable[[Config], None]) -> None:
    """Compose the config of this command line and call `run` with it.

    A mistake in the config ends the process with one line on stderr and exit code 2.
    """
    register_schema()

    composed_and_checked = False

    @hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
    def composed_main(composed: DictConfig) -> None:
        with user_errors_exit():
            config = to_config(composed)
        nonlocal composed_and_checked
        composed_and_checked = True
        run(config)

    # With this Hydra raises instead of printing its own account of the error.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        composed_main()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        if composed_and_checked:  # an error of the training itself deserves its traceback
            raise
        exit_with_error(ValueError(explain(error)))


class user_errors_exit:
    """Context manager: a ValueError or OSError inside becomes one line and exit code 2."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (ValueError, OSError)):
            exit_with_error(error)


def exit_with_error(error: Exception, code: int = EXIT_USER_ERROR, *, alone: bool = False) -> NoReturn:
    """Print the error as one line and exit; MAMBA_TRAIN_TRACEBACK=1 shows where it arose.

    When the run has several ranks, all of them exit, and one prints the line. alone: this rank does not ask the others,
    who may be in the middle of a step and would not answer.
    """
    if not alone:
        error = ranks.fail_together(error)
    if not isinstance(error, ranks.OtherRankFailed):
        if os.environ.get("MAMBA_TRAIN_TRACEBACK"):
            traceback.print_exception(error)
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    (ranks.abandon if alone else ranks.leave)(code)
    # Without `from None` the exception would print itself as the context of SystemExit.
    raise SystemExit(code) from None


def explain(error: Exception) -> str:
    """Say in one line which key or option is wrong and what would be accepted."""
    text = str(error) if error.__cause__ is None else f"{error}\n{error.__cause__}"
    if match := re.search(r"(?:In '[^']*': )?Could not find '([^'/]+)/([^']+)'", text):
        group, option = match.groups()
        options = sorted(p.stem for p in (CONF_DIR / group).glob("*.yaml"))
        return f"{group}={option}: there is no such option{_nearest(option, options)}; {group} can be {_list(options)}"
    if re.search(r"MixtureStage|Dict\[str, float\]", text):  # OmegaConf names no key inside of a list
        reason = str(error.__cause__ or error).splitlines()[0]
        return (
            f"data.mixture: {reason}; expected a list of stages such as [{{from_step:0,weights:{{A:0.3,B:0.7}}}}], "
            "with from_step a whole number, weights numbers, and quotes around a name that is a number"
        )
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1).split("@")[0]
        if parent := key if _is_open(key) else _open_parent(key):
            return f"{key}: names are added one by one, as +{parent}.NAME=VALUE; see --help"
        if "could not be converted" not in text and "Invalid value" not in text:
            if key in known_keys():
                return f"{key}: cannot be given a value of this form; see --help"
            return f"{key}: there is no such key{_nearest(key, known_keys())}; see --help"
    if match := re.search(r"Key '([^']+)' not in '(\w+)'", text):
        key = _full_key(text) or match.group(1)
        return f"{key}: there is no such key{_nearest(key, known_keys())}; see --help"
    if match := re.search(r"Value '(.*?)' of type '\w+' could not be converted to (\w+)", text):
        return f"{_full_key(text)}={match.group(1)}: expected {_type_name(match.group(2))}{_or_null(text)}"
    if match := re.search(r"Invalid value '(.*?)', expected one of \[(.*?)\]", text):
        choices = match.group(2).split(", ")
        return (
            f"{_full_key(text)}={match.group(1)}: expected one of {_list(choices)}{_or_null(text)}"
            f"{_nearest(match.group(1), choices)}"
        )
    if match := re.search(r"Value '(.*?)' is not a valid bool", text):
        return f"{_full_key(text)}={match.group(1)}: expected true or false{_or_null(text)}"
    if match := re.search(r"Cannot convert '\w+' to string: '(.*?)'\n", text):
        return f"{_full_key(text)}={match.group(1)}: expected text{_or_null(text)}"
    if match := re.search(r"merging override \S+?=(.*)\n.* is not a ListConfig, list or tuple", text):
        return f"{_full_key(text)}={match.group(1)}: expected a list such as [A,B]; an empty one is []"
    if re.search(r"Cannot assign \w+ to Dict", text):
        return f"{_full_key(text)}: names are added one by one, as +{_full_key(text)}.NAME=VALUE; see --help"
    if match := re.search(r"field '([\w.]+)' is not Optional", text):
        return f"{_full_key(text)}=null: a value is needed here"
    if re.search("Config group override must be a string", text):
        return f"{' '.join(text.split())}; the groups {_list(_groups())} are set as GROUP=OPTION"
    if re.search("parsing override|mismatched input|[Nn]o ?[Vv]iable ?[Aa]lt|extraneous input|Ambiguous value", text):
        return (
            f"cannot read the command line: {text.splitlines()[0]}; expected KEY=VALUE or GROUP=OPTION, and quotes "
            "around a value with spaces, letters beyond ASCII, or any of ()[]{}=,:;~&!# such as "
            "\"data.path='my texts (1)'\""
        )
    return " ".join(text.split())


def known_keys() -> list[str]:
    """All dotted keys of the schema and the names of the groups."""
    schema = OmegaConf.to_container(OmegaConf.structured(Config), throw_on_missing=False)
    return sorted(set(_dotted_keys(schema)) | set(_groups()))


def _is_open(key: str) -> bool:
    """Whether the names below a key are the user's own."""
    schema = OmegaConf.structured(Config)
    return key in known_keys() and OmegaConf.is_dict(schema) and OmegaConf.select(schema, key) == {}


def _open_parent(key: str) -> str | None:
    """The key with names of the user's own that `key` is below."""
    parts = key.split(".")
    parents = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next((parent for parent in parents if _is_open(parent)), None)


def _groups() -> list[str]:
    return sorted(p.name for p in CONF_DIR.iterdir() if p.is_dir())


def _dotted_keys(node: object, prefix: str = "") -> Iterable[str]:
    if isinstance(node, dict):
        for name, child in node.items():
            yield f"{prefix}{name}"
            yield from _dotted_keys(child, f"{prefix}{name}.")


def _nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing when no known name is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        # The right leaf in the wrong place: lr -> optim.lr.
        close = [key for key in known if key.split(".")[-1] == name.split(".")[-1]][:1]
    return f" (did you mean {close[0]}?)" if close else ""


def _full_key(text: str) -> str | None:
    match = re.search(r"full_key: (\S+)", text)
    return match.group(1) if match else None


def _or_null(text: str) -> str:
    """`, or null` when the key that an error is about may be null."""
    kind: Any = Config
    for part in (_full_key(text) or "").split("."):
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else None
    return ", or null" if NoneType in get_args(kind) else ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _type_name(hydra_type: str) -> str:
    names = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    return names.get(hydra_type, hydra_type)
