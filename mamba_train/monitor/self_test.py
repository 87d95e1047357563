"""Every operator on this very device against the same operator in fp64 on the CPU, forward and backward.

The decode steps, which run without gradients, forward only.

A kernel can be wrong on one kind of GPU only (a compiler's fault, a driver's); a second before a run shows it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from kernels.dispatch import triton_unsupported
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.rms_norm import add_rms_norm, gated_rms_norm
from kernels.selective_scan import selective_scan, selective_scan_step
from kernels.selective_scan.cuda import scan
from kernels.ssd import ssd, ssd_step

TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
BATCH, LENGTH, CHANNELS, STATES = 2, 200, 64, 16
SSD_HEADS, SSD_HEAD_DIM, SSD_STATES = 4, 64, 128  # of the published models: each size is a kernel of its own

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class SelfTest:
    """What the test of one operator found; error: the largest, relative to the largest value of its tensor."""

    operator: str
    kernel: str
    dtype: torch.dtype
    error: float
    worst: str

    @property
    def passed(self) -> bool:
        return self.error < TOLERANCE[self.dtype]


def run_self_tests(device: torch.device, dtype: torch.dtype) -> list[SelfTest]:
    """Test every operator on `device` with activations of `dtype`; an operator that raises has an infinite error."""
    found = []
    for name, (make, call) in (OPERATORS | (ON_GPUS if device.type == "cuda" else {})).items():
        generator = torch.Generator().manual_seed(0)
        inputs = {key: value.to(dtype).double() for key, value in make(generator).items()}
        try:
            error, worst = _largest_error(call, inputs, device, dtype)
        except Exception as raised:
            error, worst = float("inf"), f"{type(raised).__name__}: {raised}".splitlines()[0]
        found.append(SelfTest(name, kernel_of(name.split(",")[0], device, dtype), dtype, error, worst))
    return found


def kernel_of(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    """Which implementation this operator has on this device, and why."""
    name = f"mamba_train::{operator}"
    if not (hasattr(torch.ops.mamba_train, operator) and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")):
        return "PyTorch (there is no other)"
    if device.type != "cuda":
        return "PyTorch (faster on NVIDIA GPUs only)"
    x = torch.empty(1, 1, 1, device=device, dtype=dtype)
    if operator == "selective_scan":
        reason, accelerated = scan.unsupported(x, STATES), "CUDA C++"
    else:
        reason, accelerated = triton_unsupported(x), "Triton"
    return f"PyTorch ({reason})" if reason else accelerated


def _largest_error(
    call: Callable[[Inputs], Tensor], inputs: Inputs, device: torch.device, dtype: torch.dtype
) -> tuple[float, str]:
    found = _outputs_and_gradients(call, {k: v.to(device, _stored(k, dtype)) for k, v in inputs.items()})
    expected = _outputs_and_gradients(call, {k: v.clone() for k, v in inputs.items()})
    errors = {
        key: float((found[key].double().cpu() - value).abs().max() / value.abs().max().clamp(min=1e-30))
        for key, value in expected.items()
    }
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    return (errors[worst] if errors[worst] == errors[worst] else float("inf")), worst


def _outputs_and_gradients(call: Callable[[Inputs], Tensor], inputs: Inputs) -> Inputs:
    leaves = {key: value.requires_grad_() for key, value in inputs.items()}
    output = call(leaves)
    if not output.requires_grad:
        return {"output": output}
    # A weight for each output, so that errors of opposite sign do not cancel in the gradients.
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    (output * weights.to(output)).sum().backward()
    gradients = {f"gradient of {key}": leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), **{key: grad.detach() for key, grad in gradients.items()}}


def _stored(name: str, dtype: torch.dtype) -> torch.dtype:
    """Parameters and states are fp32 whatever the activations are."""
    return torch.float32 if name in ("A", "D", "dt_bias", "weight", "bias", "residual", "state") else dtype


def _draw(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


def _conv_inputs(g: torch.Generator) -> Inputs:
    return {"x": _draw(g, BATCH, LENGTH, CHANNELS), "weight": _draw(g, CHANNELS, 4), "bias": _draw(g, CHANNELS)}


def _scan_inputs(g: torch.Generator, batch: int = BATCH, length: int = LENGTH, channels: int = CHANNELS) -> Inputs:
    x, dt, z = (_draw(g, batch, length, channels) for _ in range(3))
    B, C = (_draw(g, batch, length, STATES) for _ in range(2))
    A = -torch.exp(_draw(g, channels, STATES, scale=0.5))
    return {
        "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": _draw(g, channels), "z": z, "dt_bias": _draw(g, channels) - 3
    }  # fmt: skip


def _ssd_inputs(g: torch.Generator) -> Inputs:
    x, dt = _draw(g, BATCH, LENGTH, SSD_HEADS, SSD_HEAD_DIM), _draw(g, BATCH, LENGTH, SSD_HEADS)
    B, C = (_draw(g, BATCH, LENGTH, 1, SSD_STATES) for _ in range(2))
    A = -torch.exp(_draw(g, SSD_HEADS, scale=0.5))
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": _draw(g, SSD_HEADS), "dt_bias": _draw(g, SSD_HEADS) - 3}


def _norm_inputs(g: torch.Generator) -> Inputs:
    shape = (BATCH, LENGTH, CHANNELS)
    return {"x": _draw(g, *shape), "residual": _draw(g, *shape), "weight": _draw(g, CHANNELS)}


def _gated_norm_inputs(g: torch.Generator) -> Inputs:
    shape = (BATCH, LENGTH, CHANNELS)
    return {"x": _draw(g, *shape), "z": _draw(g, *shape), "weight": _draw(g, CHANNELS)}


def _loss_inputs(g: torch.Generator) -> Inputs:
    return {"hidden": _draw(g, BATCH, LENGTH, CHANNELS), "head": _draw(g, 96, CHANNELS, scale=0.1)}


def _scan_step_inputs(g: torch.Generator) -> Inputs:
    whole = _scan_inputs(g)
    first = {key: value[:, 0] if value.dim() == 3 else value for key, value in whole.items()}
    return first | {"state": _draw(g, BATCH, CHANNELS, STATES)}


def _ssd_step_inputs(g: torch.Generator) -> Inputs:
    whole = _ssd_inputs(g)
    first = {key: value[:, 0] if value.dim() > 2 else value for key, value in whole.items()}
    return first | {"state": _draw(g, BATCH, SSD_HEADS, SSD_HEAD_DIM, SSD_STATES)}


def _conv_step_inputs(g: torch.Generator) -> Inputs:
    whole = _conv_inputs(g)
    return whole | {"x": whole["x"][:, 3], "state": whole["x"][:, :3]}


def _scan(i: Inputs) -> Tensor:
    return selective_scan(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], i["z"], i["dt_bias"])


def _ssd(i: Inputs) -> Tensor:
    return ssd(i["x"], i["dt"], i["A"], i["B"], i["C"], i["D"], dt_bias=i["dt_bias"], chunk_size=64)


def _loss(inputs: Inputs) -> Tensor:
    targets = torch.arange(BATCH * LENGTH, device=inputs["hidden"].device).remainder(96).view(BATCH, LENGTH)
    return linear_cross_entropy(inputs["hidden"], inputs["head"], targets).reshape(1)


@torch.no_grad()
def _step(step: Callable[..., tuple[Tensor, Tensor]], arguments: dict[str, Any]) -> Tensor:
    """y and the new state as one tensor."""
    return torch.cat([part.flatten().to(torch.promote_types(part.dtype, torch.float32)) for part in step(**arguments)])


Case = tuple[Callable[[torch.Generator], Inputs], Callable[[Inputs], Tensor]]
OPERATORS: dict[str, Case] = {
    "causal_conv1d": (_conv_inputs, lambda i: causal_conv1d(i["x"], i["weight"], i["bias"], activation="silu")),
    "selective_scan": (_scan_inputs, _scan),
    "ssd": (_ssd_inputs, _ssd),
    "add_rms_norm": (_norm_inputs, lambda i: sum_of(add_rms_norm(i["x"], i["residual"], i["weight"], eps=1e-5))),
    "gated_rms_norm": (
        _gated_norm_inputs,
        lambda i: gated_rms_norm(i["x"], i["z"], i["weight"], eps=1e-5, group_size=CHANNELS // 2),
    ),
    "linear_cross_entropy": (_loss_inputs, _loss),
    "causal_conv1d_step": (_conv_step_inputs, lambda i: _step(causal_conv1d_step, i | {"activation": "silu"})),
    "selective_scan_step": (_scan_step_inputs, lambda i: _step(selective_scan_step, i)),
    "ssd_step": (_ssd_step_inputs, lambda i: _step(ssd_step, i)),
}

# (batch, length, channels) that GPUs of some 100 multiprocessors treat otherwise: warps that take turns in time, and
# segments of time side by side. Elsewhere there is nothing more to see in them.
SCAN_SHAPES = {"selective_scan, chained": (1, 520, 2048), "selective_scan, segments": (1, 1024, 64)}
ON_GPUS: dict[str, Case] = {
    name: (lambda g, shape=shape: _scan_inputs(g, *shape), _scan)  # type: ignore[misc]
    for name, shape in SCAN_SHAPES.items()
}


def sum_of(parts: tuple[Tensor, Tensor]) -> Tensor:
    """Both outputs of an operator as one tensor."""
    return parts[0] + parts[1]
