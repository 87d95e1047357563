"""Beside mamba_ssm on a CUDA device: the scan's errors, and models that we export."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mamba_train.checkpoint.storage import load_model_only
from mamba_train.config import MixerKind, ModelConfig
from mamba_train.convert.export import export
from mamba_train.convert.names import Layout
from mamba_train.convert.source import load_pretrained
from mamba_train.convert.verify import logits_of, probe
from tests.convert.conftest import MakeRun, make_run, tokenizer_json  # noqa: F401  fixtures
from tests.convert.models import MAMBA1, MAMBA2
from tests.gpu.test_selective_scan import Inputs, make_inputs, poisoned, run  # noqa: F401  a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
