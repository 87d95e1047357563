"""The docstrings of the modules that have no Python source, as text that looks like a stub file.

Run as a script in a process of its own (`python -I -S module_docstrings.py OUTPUT.json`): importing
every extension module has side effects, may print, and may even crash, none of which should happen to
a training run; and the text must not depend on what the calling process has imported or patched.
"""

import importlib
import importlib.machinery
import inspect
import json
import sys
import sysconfig
import textwrap
import warnings
from pathlib import Path
from types import ModuleType


def module_names() -> list[str]:
    """Sorted names of this interpreter's built-in and extension modules, those for its tests left out."""
    names = set(sys.builtin_module_names)
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    folder = Path(sysconfig.get_paths()["platstdlib"]) / "lib-dynload"
    if folder.is_dir():
        names.update(path.name.partition(".")[0] for path in folder.iterdir() if path.name.endswith(suffixes))
    return sorted(name for name in names if "test" not in name and not name.startswith(("xx", "_xx")))


def _described(kind: str, name: str, value: object) -> str | None:
    """A definition with its docstring, or None if it has no docstring."""
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return None
    signature = getattr(value, "__text_signature__", None)
    head = f"{kind} {name}{signature if isinstance(signature, str) else ''}:"
    return head + "\n" + textwrap.indent(f'"""{inspect.cleandoc(doc)}\n"""', "    ")


def _class_text(name: str, cls: type) -> str | None:
    head = _described("class", name, cls)
    # The docstrings of special methods are the same few sentences in every class.
    methods = (
        _described("def", method, value)
        for method, value in sorted(vars(cls).items())
        if not method.startswith("_") and callable(value)
    )
    parts = [textwrap.indent(part, "    ") for part in methods if part]
    if head is None and not parts:
        return None
    return "\n\n".join([head or f"class {name}:", *parts])


def module_text(module: ModuleType) -> str:
    """The docstrings of a module, its functions, its classes and their methods; "" if it has none."""
    parts: list[str | None] = []
    if isinstance(module.__doc__, str) and module.__doc__.strip():
        parts.append(f'"""{inspect.cleandoc(module.__doc__)}\n"""')
    for name, value in sorted(vars(module).items()):
        if name.startswith("__") or inspect.ismodule(value):
            continue
        if inspect.isclass(value):
            parts.append(_class_text(name, value))
        elif callable(value):
            parts.append(_described("def", name, value))
    text = "\n\n\n".join(part for part in parts if part)
    return text + "\n" if text else ""


def main(output: str) -> None:
    """Write {module name: text} to the file `output`; a module that cannot be imported is left out."""
    warnings.simplefilter("ignore")
    texts: dict[str, str] = {}
    for name in module_names():
        try:
            texts[name] = module_text(importlib.import_module(name))
        except Exception:  # whatever an extension raises: a library it needs may be missing
            continue
    Path(output).write_text(json.dumps(texts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
