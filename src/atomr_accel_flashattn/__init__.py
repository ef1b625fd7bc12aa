"""FlashAttention for NVIDIA GPUs: CUDA C++ kernels that NVRTC compiles on first use, and a CPU backend with the same semantics.

Names are loaded when they are first used (PEP 562): importing the package costs next to nothing and never imports torch. ``__init__.pyi``
lists them. Once torch is there, before or after us, its operators are registered (torch_ops/operators.py).
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from .arrays.torch_hooks import answer_compiler, once_torch_is_there

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(name)


def _meet_torch(torch: Any) -> None:
    """Torch finds the operators by name, as in an exported program, and its compiler traces the functional calls."""
    if not hasattr(torch, "library"):  # it is being imported, and imports us: the first call of its compiler is too early to be ours
        return
    from .torch_ops.operators import register

    register()
    answer_compiler(torch)


once_torch_is_there(_meet_torch)
