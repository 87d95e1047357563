"""Is this node fit to train? Says `well NODE`, or `bad NODE: why` and exits with 1; runs on every node first."""

import argparse
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

FREE_SHARE = 0.9  # of a GPU's memory: someone else's process would make the run fail later


def main() -> None:
    """Print the verdict; what the check itself stumbles over is a finding too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, required=True, help="how many this node should have")
    args = parser.parse_args()
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    try:
        problem = find_problem(args.gpus)
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
    if problem:
        print(f"node {node} is not fit: {problem}", file=sys.stderr, flush=True)
        print(f"bad {node}: {problem}", flush=True)
        sys.exit(1)
    print(f"well {node}", flush=True)


def find_problem(n_gpus: int) -> str | None:
    """The first thing that is wrong with this node; None if nothing is."""
    if command := os.environ.get("MAMBA_TRAIN_HEALTH_COMMAND"):  # a site's own check
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        if result.returncode:
            return " ".join((result.stdout + result.stderr).split()) or f"{command}: exit code {result.returncode}"
    import torch

    if not n_gpus:
        return _kernel_problem(torch.device("cpu"))
    if torch.cuda.device_count() < n_gpus:
        return f"{torch.cuda.device_count()} GPUs are visible, expected {n_gpus}"
    for index in range(n_gpus):
        free, total = torch.cuda.mem_get_info(index)
        if free < FREE_SHARE * total:
            return f"GPU {index} has {free / 2**30:.0f} of {total / 2**30:.0f} GiB free: another process is using it"
        if problem := _kernel_problem(torch.device("cuda", index)):
            return f"GPU {index}: {problem}"
    return None


def _kernel_problem(device: "torch.device") -> str | None:
    """One small scan in fp32 there, forward and backward, against one in fp64 on the CPU."""
    import torch

    from kernels.selective_scan import selective_scan

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, dt, A, B, C = draw(2, 100, 64), draw(2, 100, 64) - 4, -draw(64, 16).exp(), draw(2, 100, 16), draw(2, 100, 16)
    results = []
    for where, dtype in ((torch.device("cpu"), torch.float64), (device, torch.float32)):
        leaves = [value.to(where, dtype).requires_grad_() for value in (x, dt, A, B, C)]
        y = selective_scan(*leaves)
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        results.append([value.detach().double().cpu() for value in (y, *gradients)])
    for expected, found in zip(*results, strict=True):
        if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item()):
            return "the selective scan computes something else than its reference"
    return None


if __name__ == "__main__":
    main()
