"""Make `kernels.selective_scan` and its siblings importable when an unrelated `kernels` comes first on the path.

The other direction, ours first, is handled inside our `kernels` package; its docstring explains the clash.
"""

import importlib.util
import sys
from pathlib import Path

OUR_KERNELS = Path(__file__).resolve().parent.parent / "kernels"


def claim() -> None:
    """See to it that our operators can be imported from the package called `kernels`.

    If the name is still free and would resolve to another distribution, our package takes it (and forwards to the
    other). If another distribution was imported already, our folder joins its search path. Imports neither torch
    nor the other distribution.
    """
    loaded = sys.modules.get("kernels")
    if loaded is not None:
        folders = getattr(loaded, "__path__", None)
        if folders is not None and not any(Path(folder).resolve() == OUR_KERNELS for folder in folders):
            folders.append(str(OUR_KERNELS))
        return
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == OUR_KERNELS:
        return
    ours = importlib.util.spec_from_file_location(
        "kernels", OUR_KERNELS / "__init__.py", submodule_search_locations=[str(OUR_KERNELS)]
    )
    assert ours is not None
    assert ours.loader is not None
    module = importlib.util.module_from_spec(ours)
    sys.modules["kernels"] = module
    try:
        ours.loader.exec_module(module)
    except BaseException:
        del sys.modules["kernels"]
        raise
