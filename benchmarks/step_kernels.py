"""The GPU time of a training step by kernel and by kind of kernel, from the profiler's trace."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

# In this order: the first that is found in a kernel's name is its kind.
KINDS = {
    "between ranks": r"nccl",
    "parts put together or cut, for ranks": r"chunk_cat|split_with_sizes",
    "matrix products": r"gemm|nvjet|cutlass|xmma|cublas|splitK",
    "selective scan": r"scan_forward|scan_backward|scan_chained|scan_ends|selective_scan",
    "SSD": r"(states|gradients|flows|decays|delta|segments)_kernel|_chunk|_bmm|_state_passing|ddA",
    "loss": r"cross_entropy|softmax|SoftMax|nll_loss",
    "update and norm of the gradient": r"adamw_kernel|FusedAdam|multi_tensor_apply|LpNorm|lpnorm",
    "convolution and norms": r"forward_kernel|backward_kernel|causal_conv1d|layer_norm|rms_norm",
    "sums of parts": r"sum_parts",
    "copies, casts, zeros": r"copy|Memcpy|Memset|memset|fill|Fill|Cat",
}
SHOWN = 14
AMBIGUOUS = ("forward_kernel", "backward_kernel")  # of the convolution and of the norms: told apart by their grid


def kernel_times(call: Callable[[], object], calls: int) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches of each kernel in a call."""
    torch.cuda.synchronize()
    # acc_events: without it the profiler warns of a cycle that there is not.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        name = event["name"]
        if name in AMBIGUOUS:
            name += f" {tuple(event['args'].get('grid', ()))}"
        found[name][0] += event["dur"] / 1e3 / calls
        found[name][1] += 1 / calls
    return {name: (time, launches) for name, (time, launches) in found.items()}


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other elementwise")


def print_kernels(times: dict[str, tuple[float, float]], step_ms: float) -> None:
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, (time, launches) in times.items():
        kinds[kind_of(name)][0] += time
        kinds[kind_of(name)][1] += launches
    whole = sum(time for time, _ in times.values())
    print(f"    {whole:.1f} ms of kernels in a step of {step_ms:.1f}:")
    for kind, (time, launches) in sorted(kinds.items(), key=lambda item: -item[1][0]):
        print(f"    {time:8.2f} ms {100 * time / whole:5.1f}% {launches:7.0f} launches  {kind}")
    for name, (time, launches) in sorted(times.items(), key=lambda item: -item[1][0])[:SHOWN]:
        print(f"      {time:8.2f} ms {launches:6.0f} x {1e3 * time / launches:7.1f} us  {short(name)}")


def short(name: str) -> str:
    """What tells kernels of torch's elementwise templates apart stands far inside their names."""
    found = re.findall(r"(\w*(?:Functor|copy_kernel|FillFunctor|FusedAdam\w*|LpNorm\w*|Adder\w*)[\w<, :]*)", name)
    return name[:70] if not found or len(name) < 70 else f"{name[:30]} ... {found[0][:60]}"
