"""A distributed pretraining toolkit for Mamba state-space language models."""

from mamba_train import _kernels_name

# Another distribution is also called `kernels`; ours must be the one that is imported here.
_kernels_name.claim()
