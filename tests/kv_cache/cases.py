"""Calls on a KV cache: a packed call of tests/cases.py whose K and V are laid out in a cache, and everything around them poisoned.

The arrays are NumPy's, or torch tensors on ``ATOMR_FLASHATTN_TEST_DEVICE`` where that is set, so the same tests run on a card.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

import atomr_accel_flashattn as fa
from tests.cases import Case, build
from tests.check import Report, Run, check_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.inputs import Inputs

    Array = NDArray[Any]

__all__ = ["CacheCase", "Filled", "check_cached", "download", "fill", "unused_entries", "upload", "with_plan"]

DEVICE = os.environ.get("ATOMR_FLASHATTN_TEST_DEVICE", "")


def upload(array: Array | None) -> Any:
    """The same values on the device of the tests; NumPy arrays stay what they are unless the variable is set."""
    if array is None or not DEVICE:
        return array
    import torch

    host = np.ascontiguousarray(array).reshape(array.shape)  # which makes a dimension where there is none
    if host.dtype.name == "bfloat16":
        return torch.from_numpy(host.view(np.int16).copy()).to(DEVICE).view(torch.bfloat16)
    if host.dtype.name.startswith("float8"):
        return torch.from_numpy(host.view(np.uint8).copy()).to(DEVICE).view(getattr(torch, host.dtype.name))
    return torch.from_numpy(host.copy()).to(DEVICE)


def download(array: Any) -> Array:
    """As NumPy has it."""
    if isinstance(array, np.ndarray):
        return array
    host = array.detach().cpu()
    name = str(host.dtype)
    if "float8" in name:
        return np.asarray(host.view(__import__("torch").uint8).numpy().view(getattr(ml_dtypes, name.removeprefix("torch."))))
    return np.asarray(host.view(__import__("torch").int16).numpy().view(ml_dtypes.bfloat16) if "bfloat16" in name else host.numpy())


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCase:
    """``call`` is packed; ``block_size`` 0 is a contiguous cache. Equal lengths of q make a dense q."""

    call: Case
    block_size: int = 16
    layout: fa.KvLayout = fa.KvLayout.NHD
    left_pad: bool = False
    batch_idx: bool = False
    poison: float = float("nan")
    num_splits: int = 0
    batch_invariant: bool = False
    planned: bool = False

    def __str__(self) -> str:
        kind = f"page{self.block_size}{self.layout.value}" if self.block_size else "contiguous"
        more = (
            "leftpad" if self.left_pad else "",
            "batch_idx" if self.batch_idx else "",
            f"poison{self.poison:g}",
            f"splits{self.num_splits}" if self.num_splits else "",
            "invariant" if self.batch_invariant else "",
            "planned" if self.planned else "",
        )
        return "-".join(each for each in (str(self.call), kind, *more) if each)


@dataclass(frozen=True, slots=True, eq=False)
class Filled:
    """A cache in host memory and what says where the sequences lie in it."""

    k: Array
    v: Array
    lengths: Array
    table: Array | None = None
    rows: Array | None = None
    left_pad: Array | None = None


def unused_entries(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Entries of a table that must not be followed."""
    return random.choice(np.array([-1, -(2**31), 2**31 - 1, 1 << 20], np.int32), shape)


def fill(case: CacheCase, inputs: Inputs, *, room: int = 0) -> Filled:
    """Lay out K and V; what no sequence owns holds the poison. ``room``: free slots of its own behind each sequence."""
    random = np.random.default_rng(zlib.crc32(str(case).encode()))
    sequences = list(inputs.sequences())
    lengths = np.array([len(each.k) for each in sequences], np.int32)
    if not case.block_size:
        pads = random.integers(0, 5, len(sequences)).astype(np.int32) if case.left_pad else np.zeros(len(sequences), np.int32)
        rows = random.permutation(len(sequences) + 2)[: len(sequences)].astype(np.int32) if case.batch_idx else np.arange(len(sequences))
        slots = int((lengths + pads).max(initial=0)) + room + 3
        k, v = (np.full((len(sequences) + 2, slots, *x.shape[1:]), case.poison, x.dtype) for x in (inputs.k, inputs.v))
        for each, row, pad in zip(sequences, rows, pads, strict=True):
            k[row, pad : pad + len(each.k)], v[row, pad : pad + len(each.k)] = each.k, each.v
        return Filled(k, v, lengths + pads, None, rows if case.batch_idx else None, pads if case.left_pad else None)
    size = case.block_size
    pages = [-(-(int(length) + room) // size) for length in lengths]
    free = random.permutation(sum(pages) + 3)
    table = unused_entries(random, (len(sequences), max(pages, default=0) + 2))
    k, v = (np.full((sum(pages) + 3, size, *x.shape[1:]), case.poison, x.dtype) for x in (inputs.k, inputs.v))
    for index, (each, count) in enumerate(zip(sequences, pages, strict=True)):
        own, free = free[:count], free[count:]
        table[index, :count] = own
        for slot in range(len(each.k)):
            k[own[slot // size], slot % size], v[own[slot // size], slot % size] = each.k[slot], each.v[slot]
    if case.layout is fa.KvLayout.HND:
        k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (k, v))
    return Filled(k, v, lengths, table)


def asked_of(case: CacheCase, inputs: Inputs) -> dict[str, Any]:
    """Arguments that every request has."""
    return {
        "mask": fa.MaskKind(inputs.left, inputs.right),
        "sink_tokens": inputs.sink_tokens,
        "bias": fa.PositionBias(upload(inputs.alibi_slopes)),
        "options": fa.AttentionOptions(
            softmax_scale=inputs.softmax_scale,
            softcap=inputs.softcap,
            learned_sink=upload(inputs.learned_sink),
            batch_invariant=case.batch_invariant,
        ),
        "num_splits": case.num_splits,
    }


def request_of(case: CacheCase, inputs: Inputs, cache: Filled, fp8: fa.Fp8Options | None = None, out_dtype: Any = None) -> tuple[Any, Any]:
    """The request, and the array that it writes, which holds NaN and is of q's type unless another is named."""
    lengths = case.call.lengths_q
    assert lengths is not None
    equal = len(set(lengths)) == 1
    q = inputs.q.reshape(len(lengths), lengths[0], *inputs.q.shape[1:]) if equal else inputs.q
    out = upload(np.full((*q.shape[:-1], inputs.v.shape[-1]), np.nan, out_dtype or q.dtype))
    offsets = None if equal else fa.CumulativeSeqlens(upload(inputs.cu_seqlens_q), max(lengths, default=0))
    more = {"cu_seqlens_q": offsets, "out": out, "fp8": fp8, **asked_of(case, inputs)}
    k, v, seq_lens = (upload(x) for x in (cache.k, cache.v, cache.lengths))
    if cache.table is not None:
        return fa.PagedAttentionRequest(upload(q), k, v, upload(cache.table), seq_lens, layout=case.layout, **more), out
    rows, pads = upload(cache.rows), upload(cache.left_pad)
    return fa.CachedFwdRequest(upload(q), k, v, seq_lens, cache_batch_idx=rows, cache_leftpad=pads, **more), out


def with_plan(request: Any) -> Any:
    """The same in the blocks of a StepPlan of its own, which has its lengths."""
    plan = fa.StepPlan.of(request)
    planned = replace(request, plan=plan)
    plan.schedule_for(planned)
    return planned


def check_cached(case: CacheCase) -> Report:
    """Run a case and compare it with the oracle of the packed call."""
    inputs = build(case.call)
    request, out = request_of(case, inputs, fill(case, inputs))
    if case.planned:
        request = with_plan(request)
    output = fa.run(request)
    assert output.out is out
    made, lse = download(output.out), download(output.lse)
    if made.ndim == 4:
        made, lse = made.reshape(inputs.out_shape), lse.transpose(1, 0, 2).reshape(inputs.lse_shape)
    return check_arrays(str(case), inputs, Run(made, lse))
