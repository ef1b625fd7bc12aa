"""Inputs and calls that the tests of the operators share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import atomr_accel_flashattn as fa

__all__ = ["FORMS", "OPTIONS", "PACKED_ENDS", "gradients", "leaves", "operators", "parts_of"]

operators = torch.ops.atomr_accel_flashattn

PACKED_ENDS = (0, 5, 5, 12)


def leaves(*sizes: int, heads: tuple[int, int] = (4, 2), width: int = 16, dtype: Any = torch.float32, seed: int = 0) -> list[Any]:
    """q, k and v, (*sizes, H, D), that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (heads[0], heads[1], heads[1])
    return [torch.randn(*(sizes or (2, 6)), number, width, generator=generator).to(dtype).requires_grad_() for number in numbers]


def gradients(loss: Any, tensors: list[Any]) -> list[Any]:
    return list(torch.autograd.grad(loss, tensors))


def parts_of(made: Any) -> list[Any]:
    """The tensors of a result, which may be (o, LSE, pattern or None)."""
    return [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]


def _ends() -> Any:
    return torch.tensor(PACKED_ENDS, dtype=torch.int32)


# name: (sizes of q before heads, call on q, k, v)
FORMS: dict[str, tuple[tuple[int, ...], Callable[..., Any]]] = {
    "flash_attn_func": ((2, 6), fa.flash_attn_func),
    "flash_attn_kvpacked_func": ((2, 6), lambda q, k, v, **o: fa.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), **o)),
    "flash_attn_qkvpacked_func": ((2, 6), lambda q, k, v, **o: fa.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), **o)),
    "flash_attn_varlen_func": ((12,), lambda q, k, v, **o: fa.flash_attn_varlen_func(q, k, v, _ends(), _ends(), 7, 7, **o)),
    "flash_attn_varlen_kvpacked_func": (
        (12,),
        lambda q, k, v, **o: fa.flash_attn_varlen_kvpacked_func(q, torch.stack((k, v), 1), _ends(), _ends(), 7, 7, **o),
    ),
    "flash_attn_varlen_qkvpacked_func": (
        (12,),
        lambda q, k, v, **o: fa.flash_attn_varlen_qkvpacked_func(torch.stack((q, k, v), 1), _ends(), 7, **o),
    ),
}

# Each alone changes o, the gradients or what is returned.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "dropout": {"dropout_p": 0.3},
    "scale": {"softmax_scale": 0.7},
    "causal": {"causal": True},
    "window": {"window_size": (1, 2)},
    "window, list": {"window_size": [0, -1]},
    "softcap": {"softcap": 0.5},
    "softcap of none": {"softcap": -1.0},
    "slopes": {"alibi_slopes": torch.tensor([0.5, 0.25, 2.0, 1.0])},
    "deterministic": {"deterministic": True},
    "probs": {"return_attn_probs": True},
    "probs of dropout": {"return_attn_probs": True, "dropout_p": 0.3},
    "sink": {"learned_sink": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sink tokens": {"window_size": (1, 0), "sink_tokens": 1},
    "all": {
        "dropout_p": 0.2,
        "softmax_scale": 0.3,
        "causal": True,
        "window_size": (2, 3),
        "softcap": 2.0,
        "sink_tokens": 1,
        "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "learned_sink": torch.ones(4),
        "return_attn_probs": True,
    },
}
