"""A decoded token on an NVIDIA GPU: the parts of a layer's step, in few kernels.

They compute what `rms_norm`, `causal_conv1d_step`, `selective_scan_step` and `ssd_step` do between two matrix products,
and the products, too; in plain PyTorch that is `MambaLM.step`, against which they are tested. Without gradients, for
contiguous tensors of one GPU; a state is overwritten. No operators of torch.library: their place is a CUDA graph.
"""

from kernels.decode.batch_launch import (
    dt_scan_many,
    gated_normed,
    library_product_in_parts,
    normed,
    product,
    product_in_parts,
)
from kernels.decode.launch import MAX_BATCH, conv_project, conv_ssd, dt_scan, greedy, holds, linear, supports

__all__ = [
    "MAX_BATCH",
    "conv_project",
    "conv_ssd",
    "dt_scan",
    "dt_scan_many",
    "gated_normed",
    "greedy",
    "holds",
    "library_product_in_parts",
    "linear",
    "normed",
    "product",
    "product_in_parts",
    "supports",
]
