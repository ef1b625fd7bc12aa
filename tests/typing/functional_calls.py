"""Never run: mypy checks it. A call returns arrays of the type of q; what is wrong here has to be an error, or its ignore is one."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import atomr_accel_flashattn as fa

F16 = NDArray[np.float16]


class Tensor:
    """Of some library."""

    def tolist(self) -> list[int]:
        raise NotImplementedError

    def __index__(self) -> int:
        raise NotImplementedError


class Parameter(Tensor):
    """A subclass of it."""


def dense(q: Tensor, array: F16, device: fa.DeviceArray, *, probs: bool) -> None:
    assert_type(fa.flash_attn_func(q, q, q), Tensor)
    assert_type(fa.flash_attn_func(q, q, q, 0.1, None, True, (3, 0), 0.0, None, False), Tensor)
    assert_type(fa.flash_attn_func(array, array, array, causal=True), F16)
    assert_type(fa.flash_attn_func(device, device, device, return_attn_probs=False), fa.DeviceArray)
    assert_type(fa.flash_attn_func(q, q, q, return_attn_probs=True), tuple[Tensor, Any, Any])
    assert_type(fa.flash_attn_func(q, q, q, 0.0, None, False, (-1, -1), 0.0, None, False, True), tuple[Tensor, Any, Any])
    assert_type(fa.flash_attn_func(q, q, q, return_attn_probs=probs), Tensor | tuple[Tensor, Any, Any])
    assert_type(fa.flash_attn_func(q, q, q, out=q), Tensor)
    assert_type(fa.flash_attn_func(Parameter(), q, q), Parameter)
    out, _, pattern = fa.flash_attn_func(array, array, array, 0.1, return_attn_probs=True)
    assert_type(out, F16)
    assert_type(pattern, Any)


def windows(q: Tensor) -> None:
    for window in ((3, 0), [3, 0], q, (q, 0), np.array([3, 0]), (np.int64(3), np.int64(0))):
        assert_type(fa.flash_attn_func(q, q, q, window_size=window), Tensor)
    fa.flash_attn_func(q, q, q, window_size=3)  # type: ignore[call-overload]
    fa.flash_attn_func(q, q, q, window_size=(0.5, 0))  # type: ignore[arg-type]


def packed_forms(q: Tensor, array: F16) -> None:
    assert_type(fa.flash_attn_qkvpacked_func(q), Tensor)
    assert_type(fa.flash_attn_qkvpacked_func(q, return_attn_probs=True), tuple[Tensor, Any, Any])
    assert_type(fa.flash_attn_kvpacked_func(array, array, causal=True), F16)
    assert_type(fa.flash_attn_kvpacked_func(array, array, return_attn_probs=True), tuple[F16, Any, Any])


def sequences(q: Tensor, ends: Any, *, probs: bool) -> None:
    assert_type(fa.flash_attn_varlen_func(q, q, q, ends, ends, 5, 5), Tensor)
    assert_type(fa.flash_attn_varlen_func(q, q, q, ends, ends, q, np.int64(5), block_table=None), Tensor)
    assert_type(fa.flash_attn_varlen_func(q, q, q, ends, ends, 5, 5, return_attn_probs=True), tuple[Tensor, Any, Any])
    assert_type(fa.flash_attn_varlen_func(q, q, q, ends, ends, 5, 5, return_attn_probs=probs), Tensor | tuple[Tensor, Any, Any])
    assert_type(fa.flash_attn_varlen_qkvpacked_func(q, ends, 5), Tensor)
    assert_type(fa.flash_attn_varlen_qkvpacked_func(q, ends, q, return_attn_probs=True), tuple[Tensor, Any, Any])
    assert_type(fa.flash_attn_varlen_kvpacked_func(q, q, ends, ends, 5, 5), Tensor)
    assert_type(fa.flash_attn_varlen_kvpacked_func(q, q, ends, ends, 5, 5, return_attn_probs=True), tuple[Tensor, Any, Any])


def wrong(q: Tensor) -> None:
    fa.flash_attn_func(q, q)  # type: ignore[call-overload]
    fa.flash_attn_func(q, q, q, casual=True)  # type: ignore[call-overload]
    fa.flash_attn_func(q, q, q, softmax_scale="1")  # type: ignore[call-overload]
    fa.flash_attn_func(q, q, q, return_attn_probs="yes")  # type: ignore[call-overload]
    fa.flash_attn_varlen_func(q, q, q, q, q, 5.0, 5)  # type: ignore[call-overload]
    number: int = fa.flash_attn_func(q, q, q)  # type: ignore[assignment]
    assert number
