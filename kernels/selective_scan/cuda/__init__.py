"""The selective scan in CUDA C++, compiled on the user's machine by NVRTC; docs/kernels.md explains it."""
