"""A decoded token of a few sequences on an NVIDIA GPU: the parts of a layer's step, each one kernel.

They compute what `rms_norm`, `causal_conv1d_step`, `selective_scan_step` and `ssd_step` do between two matrix products,
and the products, too; in plain PyTorch that is `MambaLM.step`, against which they are tested. Without gradients, for
contiguous tensors of one GPU; a state is overwritten. No operators of torch.library: their place is a CUDA graph.
"""

from kernels.decode.batch_launch import conv_scan, gated_normed, normed, product, product_in_parts, split_ahead
from kernels.decode.launch import MAX_BATCH, conv_project, conv_ssd, dt_scan, greedy, holds, linear, supports

__all__ = [
    "MAX_BATCH",
    "conv_project",
    "conv_scan",
    "conv_ssd",
    "dt_scan",
    "gated_normed",
    "greedy",
    "holds",
    "linear",
    "normed",
    "product",
    "product_in_parts",
    "split_ahead",
    "supports",
]
