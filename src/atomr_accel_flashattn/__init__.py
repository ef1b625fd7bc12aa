"""FlashAttention for NVIDIA GPUs: CUDA C++ kernels that NVRTC compiles on first use, and a CPU backend with the same semantics.

Names are loaded when they are first used (PEP 562): importing the package costs next to nothing and never imports torch. ``__init__.pyi``
lists them.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)
