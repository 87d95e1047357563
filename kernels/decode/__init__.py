"""A decoded token of a few sequences on an NVIDIA GPU: the parts of a layer's step, each one kernel.

They compute what `rms_norm`, `causal_conv1d_step`, `selective_scan_step` and `ssd_step` do between two matrix products,
and the products, too. Without gradients, for contiguous tensors; a state is overwritten. `reference.py` says what each
computes, and is taken where there is no such GPU.
"""

from kernels.decode.launch import MAX_BATCH, conv_project, conv_ssd, dt_scan, greedy, linear, supports

__all__ = ["MAX_BATCH", "conv_project", "conv_ssd", "dt_scan", "greedy", "linear", "supports"]
