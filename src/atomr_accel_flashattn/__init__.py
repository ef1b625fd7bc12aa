"""FlashAttention for NVIDIA GPUs: CUDA C++ kernels that NVRTC compiles on first use, and a CPU backend with the same semantics."""

from __future__ import annotations

__version__ = "0.1.0"
