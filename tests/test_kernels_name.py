"""Our `kernels` beside the unrelated distribution of that name, which `transformers` probes for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# What transformers takes from the other distribution, and a submodule that it imports by path.
OTHER_INIT = """
import sys
from .layer.mode import Mode
import kernels.layer
assert kernels.layer.NAME == "other layer"
__version__ = "0.18.2"
LOADED = sys.modules.setdefault("other_kernels_loaded", object()) and True
class Device: pass
class CUDAProperties: pass
class ROCMProperties: pass
class LayerRepository:
    def __init__(self, *args, **kwargs): pass
class LocalLayerRepository(LayerRepository): pass
class KernelizeFallback: pass
def get_kernel(*args, **kwargs): return "other kernel"
def _wrapper(*args, **kwargs): return lambda value: value
register_kernel_mapping = replace_kernel_forward_from_hub = use_kernel_mapping = kernelize = _wrapper
use_kernel_forward_from_hub = use_kernelized_func = _wrapper
"""
OTHER_MODE = """
import enum
class Mode(enum.Flag):
    INFERENCE = enum.auto()
    TRAINING = enum.auto()
    TORCH_COMPILE = enum.auto()
    FALLBACK = enum.auto()
"""

USE_OURS = """
import mamba_train
from kernels.selective_scan import selective_scan
from kernels.rms_norm import rms_norm
assert Path(sys.modules["kernels.selective_scan"].__file__).is_relative_to(repository)
"""
USE_TRANSFORMERS = """
import transformers
from transformers import MambaConfig, MambaForCausalLM
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available() == other_has_metadata
MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
"""
USE_OTHER = """
from kernels import LayerRepository, get_kernel
import kernels.layer.mode
assert get_kernel() == "other kernel"
assert kernels.LOADED and kernels.layer.NAME == "other layer"
assert kernels.layer.mode.Mode is kernels.Mode
"""


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder for the path that holds the other distribution's package."""
    layer = tmp_path / "other" / "kernels" / "layer"
    layer.mkdir(parents=True)
    (layer.parent / "__init__.py").write_text(OTHER_INIT)
    (layer / "__init__.py").write_text("NAME = 'other layer'\n")
    (layer / "mode.py").write_text(OTHER_MODE)
    return tmp_path / "other"


def add_metadata(other: Path) -> None:
    folder = other / "kernels-0.18.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (folder / "RECORD").write_text("kernels/__init__.py,,\n")


def run(code: str, repository: Path, folders: list[Path], metadata: bool = False) -> None:
    head = (
        f"import sys; from pathlib import Path\nrepository = Path({str(repository)!r})\n"
        f"other_has_metadata = {metadata}\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", head + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "theirs-first"])
@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "no-metadata"])
@pytest.mark.parametrize("order", ["transformers-then-ours", "ours-then-transformers"])
def test_both_work_side_by_side(ours_first: bool, metadata: bool, order: str, repository: Path, other: Path) -> None:
    if metadata:
        add_metadata(other)
    parts = [USE_TRANSFORMERS, USE_OURS] if order == "transformers-then-ours" else [USE_OURS, USE_TRANSFORMERS]
    folders = [repository, other] if ours_first else [other, repository]
    run("".join([*parts, USE_OTHER]), repository, folders, metadata)


def test_ours_alone(repository: Path, tmp_path: Path) -> None:
    tail = "import kernels\nassert not hasattr(kernels, 'get_kernel')\n"
    run(USE_TRANSFORMERS + USE_OURS + tail, repository, [repository, tmp_path])


@pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "theirs-first"])
def test_the_name_is_claimed_cheaply(ours_first: bool, repository: Path, other: Path) -> None:
    """Neither torch nor the other distribution is imported for it, nor by tools that probe for dunder names."""
    folders = [repository, other] if ours_first else [other, repository]
    code = """
import mamba_train, kernels, inspect
assert Path(kernels.__file__).is_relative_to(repository)
assert "torch" not in sys.modules
assert not hasattr(kernels, "__wrapped__") and not hasattr(kernels, "selective_scan")
assert "other_kernels_loaded" not in sys.modules
assert not hasattr(kernels, "no_such_name")
assert "other_kernels_loaded" in sys.modules
"""
    run(code, repository, folders)


def test_an_error_inside_the_other_distribution_is_not_hidden(repository: Path, other: Path) -> None:
    (other / "kernels" / "__init__.py").write_text("import no_such_dependency\n")
    code = """
import kernels
for _ in range(2):
    try:
        from kernels import get_kernel
    except ImportError as error:
        assert "no_such_dependency" in str(error)
    else:
        raise SystemExit("no error")
from kernels.selective_scan import selective_scan
"""
    run(code, repository, [repository, other])
