"""The operators: one folder each, with a plain PyTorch reference and a public function that picks an implementation.

`kernels` is also the import name of an unrelated distribution that `transformers` probes for. When both are on the
path and this one is found first, the other one must still work: its folder joins `__path__`, so its submodules import
as before, and names not defined here are looked up in its `__init__`, which runs on the first such lookup. The
opposite order is taken care of by `mamba_train._kernels_name`. Importing this package must stay cheap: no torch here.
"""

import importlib.machinery
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).resolve().parent


def _find_other() -> importlib.machinery.ModuleSpec | None:
    """The spec of the other distribution's `kernels`, found by looking along the path without importing it."""
    for entry in sys.path:
        spec = importlib.machinery.PathFinder.find_spec(__name__, [entry])
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent != _HERE:
            return spec
    return None


_other_spec = _find_other()
_other_module: ModuleType | None = None
_other_lock = threading.RLock()
if _other_spec is not None:
    __path__.extend(_other_spec.submodule_search_locations or ())


def _load_other(spec: importlib.machinery.ModuleSpec) -> ModuleType:
    """Run the other distribution's `__init__` once, beside `sys.modules`, where this package keeps the name."""
    global _other_module
    with _other_lock:
        if _other_module is None:
            assert spec.loader is not None
            _other_module = importlib.util.module_from_spec(spec)  # set first: its own imports may come back here
            try:
                spec.loader.exec_module(_other_module)
            except BaseException:
                _other_module = None
                raise
    return _other_module


def __getattr__(name: str) -> object:
    # Tools probe modules for dunder names and the import system for our own submodules: neither may run the other's
    # code.
    is_ours = (_HERE / name).is_dir() or (_HERE / f"{name}.py").is_file()
    is_probe = name.startswith("__") and name != "__version__"
    if _other_spec is not None and not is_ours and not is_probe:
        try:
            return getattr(_load_other(_other_spec), name)
        except AttributeError:
            pass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
