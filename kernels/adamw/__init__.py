"""AdamW over many tensors in one launch, with their copies in bf16. Where it cannot run there is torch's own."""

from kernels.adamw.launch import FusedAdamW, Parameter, unsupported

__all__ = ["FusedAdamW", "Parameter", "unsupported"]
