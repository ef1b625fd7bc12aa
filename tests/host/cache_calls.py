"""Functional calls over a KV cache as values, on a fake GPU that notes what is launched and computes nothing."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.arrays import new
from atomr_accel_flashattn.arrays.torch_hooks import hooks, meet_torch
from atomr_accel_flashattn.runtime import plan as store
from atomr_accel_flashattn.torch_ops import repeat
from tests.fakes.gpu import STREAM, FakeGpu
from tests.fakes.kernel import read_parameters
from tests.fakes.tensors import FakeCuda, GuardOfFakes, fake, fresh_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

__all__ = ["CHANGES", "CacheCall", "NotingGpu", "install", "launches_of", "launches_of_a_fresh"]


@dataclass
class NotingGpu(FakeGpu):
    """``noted``: kernel, bytes of parameters, grid and stream of each launch. Memory of one kind has one address in every call."""

    noted: list[tuple[str, bytes, int, int]] = field(default_factory=list)
    memory: dict[Any, FakeCuda] = field(default_factory=dict)

    def on_launch(self, config: Any, function: Any, arguments: Any, _extra: None) -> int:
        number, config, address = ctypes.addressof(function._obj), config._obj, arguments._obj[0]
        spec = self.specs[number - 1]
        self.noted.append((spec.HEADER, bytes(read_parameters(spec, address)), config.grid[0], config.stream or 0))
        return self.status

    def empty(self, shape: Any, strides: Any, dtype: Any) -> FakeCuda:
        kind = tuple(shape), tuple(strides), dtype
        if kind not in self.memory:
            self.memory[kind] = fake(torch.empty_strided(shape, strides, dtype=dtype))
        return self.memory[kind]


def install(monkeypatch: pytest.MonkeyPatch, arch: fa.SmArch) -> Iterator[NotingGpu]:
    """The card, and torch's hooks for it."""
    card = NotingGpu()
    card.install(monkeypatch, arch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    fresh_hooks(monkeypatch)
    meet_torch()
    hooks.plain_types = frozenset({FakeCuda})
    assert hooks.guard is not None
    hooks.guard = GuardOfFakes
    hooks.current_device, hooks.empty_on_current, hooks.device_count = (lambda: 0), card.empty, lambda: 2
    make = new.empty_torch

    def like_other(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        made = make(like, shape, dtype)
        return card.empty(made.shape, made.stride(), made.dtype)

    def filled(like: Any, size: Any, value: int, **options: Any) -> Any:
        return card.empty(size, (1,), options["dtype"]).fill_(value)

    monkeypatch.setattr(new, "empty_torch", like_other)
    monkeypatch.setattr(FakeCuda, "new_full", filled, raising=False)
    yield card
    repeat.clear()


def launches_of(card: NotingGpu, call: CacheCall) -> tuple[list[Any], Any]:
    """What a call launches, and what it returns, by shape, strides and type."""
    card.noted.clear()
    made = call.run()
    outputs = made if isinstance(made, tuple) else (made,)
    return list(card.noted), [(x.shape, x.stride(), x.dtype, x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in outputs]


def launches_of_a_fresh(card: NotingGpu, call: CacheCall, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Any]:
    """The same, as if no call was ever made before."""
    with monkeypatch.context() as patch:
        patch.setattr(store, "_plans", {})
        for name in ("shortcuts", "latest"):
            patch.setattr(repeat, name, {})
        return launches_of(card, call)


@dataclass(frozen=True, eq=False)
class CacheCall:
    """One call; ``moved`` names the argument that ``offset`` elements shift, and whose rows ``pad`` elements lengthen."""

    batch: int = 2
    seqlen_q: int = 1
    heads: int = 4
    heads_kv: int = 2
    head_dim: int = 32
    v_head_dim: int = 32
    dtype: torch.dtype = torch.float16
    cache_dtype: torch.dtype | None = None
    page: int = 16  # 0 is a contiguous cache
    entries: int = 9
    blocks: int = 20
    lengths: Any = "tensor"  # a number, or None
    left_pad: bool = False
    rows: bool = False
    new: int = 0
    rotary: int = 0
    wide: bool = False
    together: bool = False  # K and V in turns in one array
    slopes: int = 0  # dimensions
    learned_sink: bool = False
    descales: str = ""
    by_slot: bool = False  # the descales of the cache
    out: bool = False
    plan: bool = False
    packed: bool = False
    offset: int = 0
    pad: int = 0
    moved: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arguments", self._arguments())

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> FakeCuda:
        offset, pad = (self.offset, self.pad) if name == self.moved else (0, 0)
        flat = torch.zeros(torch.Size((*shape[:-1], shape[-1] + pad)).numel() + offset, dtype=dtype)
        return fake(flat[offset:].view(*shape[:-1], shape[-1] + pad)[..., : shape[-1]])

    def _arguments(self) -> dict[str, Any]:
        q_lead = (self.batch * self.seqlen_q,) if self.packed else (self.batch, self.seqlen_q)
        made: dict[str, Any] = {"q": self.tensor("q", self.dtype, *q_lead, self.heads, self.head_dim)}
        made |= self._cache() | self._new_tokens() | self._biases()
        if self.out:
            made["out"] = self.tensor("out", self.dtype, *q_lead, self.heads, self.v_head_dim)
        if self.plan:
            made["step_plan"] = self._plan(made["q"])
            made["step_plan"].schedule(made["cache_seqlens"])
        if self.packed:
            offsets = {f"cu_seqlens_{of}": self.tensor("", torch.int32, self.batch + 1) for of in "qk"}
            made |= offsets | {"max_seqlen_q": self.seqlen_q, "max_seqlen_k": 100, "k": made.pop("k_cache"), "v": made.pop("v_cache")}
            del made["cache_seqlens"]
        return made | self.numbers

    def _cache(self) -> dict[str, Any]:
        kind = self.cache_dtype or self.dtype
        lead = (self.blocks, self.page) if self.page else (self.batch + 1, 48)
        if self.together:
            both = fake(torch.zeros(*lead, 2, self.heads_kv, self.head_dim, dtype=kind))
            made: dict[str, Any] = {"k_cache": both[:, :, 0], "v_cache": both[:, :, 1]}
        else:
            widths = {"k_cache": self.head_dim, "v_cache": self.v_head_dim}
            made = {name: self.tensor(name, kind, *lead, self.heads_kv, width) for name, width in widths.items()}
        if self.page:
            made["block_table"] = self.tensor("block_table", torch.int32, self.batch, self.entries)
        vectors = {"cache_leftpad": self.left_pad, "cache_batch_idx": self.rows, "cache_seqlens": self.lengths == "tensor"}
        made |= {name: self.tensor(name, torch.int32, self.batch) for name, there in vectors.items() if there}
        return made if self.lengths == "tensor" else made | {"cache_seqlens": self.lengths}

    def _new_tokens(self) -> dict[str, Any]:
        widths = {"k": self.head_dim, "v": self.v_head_dim} if self.new else {}
        made = {name: self.tensor(name, self.dtype, self.batch, self.new, self.heads_kv, width) for name, width in widths.items()}
        kind, tables = torch.float32 if self.wide else self.dtype, ("rotary_cos", "rotary_sin") if self.rotary else ()
        return made | {name: self.tensor(name, kind, 200, self.rotary // 2) for name in tables}

    def _biases(self) -> dict[str, Any]:
        lead = (self.blocks, self.page) if self.by_slot else (self.batch,)
        shapes: dict[str, tuple[int, ...]] = {f"{of}_descale": (*lead, self.heads_kv) for of in self.descales}
        if self.slopes:
            shapes["alibi_slopes"] = (self.batch, self.heads)[2 - self.slopes :]
        if self.learned_sink:
            shapes["learned_sink"] = (self.heads,)
        return {name: self.tensor(name, torch.float32, *shape) for name, shape in shapes.items()}

    def _plan(self, q: FakeCuda) -> fa.StepPlan:
        widths = {"head_dim": self.head_dim, "v_head_dim": self.v_head_dim, "heads": self.heads, "heads_kv": self.heads_kv}
        capacity = self.page * self.entries
        return fa.StepPlan(q, batch=self.batch, capacity=capacity, seqlen_q=self.seqlen_q, new_tokens=self.new, **widths)

    def anew(self, **changes: Any) -> CacheCall:
        """The same on tensors of its own."""
        return replace(self, **changes)

    def run(self) -> Any:
        given: dict[str, Any] = self.arguments  # type: ignore[attr-defined]
        return (fa.flash_attn_varlen_func if self.packed else fa.flash_attn_with_kvcache)(**given)


# What one argument or number may be, beside what it is in ``CacheCall()``.
CHANGES: dict[str, dict[str, Any]] = {
    "batch": {"batch": 3},
    "seqlen_q": {"seqlen_q": 3},
    "many queries": {"seqlen_q": 40},
    "heads": {"heads": 8},
    "heads_kv": {"heads_kv": 1},
    "head_dim": {"head_dim": 64},
    "v_head_dim": {"v_head_dim": 16},
    "dtype": {"dtype": torch.bfloat16},
    "page": {"page": 8},
    "entries": {"entries": 7},
    "blocks": {"blocks": 33},
    "contiguous": {"page": 0},
    "rows": {"page": 0, "rows": True},
    "padding": {"page": 0, "left_pad": True},
    "a length": {"lengths": 11},
    "no lengths": {"lengths": None},
    "a length, contiguous": {"page": 0, "lengths": 0},
    "new tokens": {"new": 1},
    "two new tokens": {"new": 2},
    "new tokens, contiguous": {"new": 2, "page": 0, "rows": True, "left_pad": True},
    "K and V in turns": {"together": True},
    "new tokens, K and V in turns": {"together": True, "new": 1},
    "new tokens behind a length": {"new": 2, "lengths": 3},
    "rotary": {"new": 2, "rotary": 32},
    "rotary of a part": {"new": 2, "rotary": 8},
    "rotary in float32": {"new": 2, "rotary": 32, "wide": True},
    "rotary, halves": {"new": 2, "rotary": 32, "numbers": {"rotary_interleaved": False}},
    "slopes": {"slopes": 1},
    "slopes by sequence": {"slopes": 2},
    "learned_sink": {"learned_sink": True},
    "out": {"out": True},
    "new tokens and out": {"new": 1, "out": True},
    "a plan": {"plan": True},
    "a plan and new tokens": {"plan": True, "new": 1},
    "packed": {"packed": True},
    "packed, two queries": {"packed": True, "seqlen_q": 2},
    "packed, other longest": {"packed": True, "numbers": {"max_seqlen_k": 99}},
    "packed, LSE": {"packed": True, "out": True, "learned_sink": True, "numbers": {"return_attn_probs": True, "causal": True}},
    "fp8": {"cache_dtype": torch.float8_e4m3fn},
    "fp8 with descales": {"cache_dtype": torch.float8_e4m3fn, "descales": "kv"},
    "fp8 by slot": {"cache_dtype": torch.float8_e4m3fn, "descales": "kv", "by_slot": True},
    "fp8 by slot, new tokens": {"cache_dtype": torch.float8_e4m3fn, "descales": "kv", "by_slot": True, "new": 1},
    "fp8 new tokens": {"cache_dtype": torch.float8_e4m3fn, "descales": "kv", "new": 1, "rotary": 16},
    "fp8 all": {"cache_dtype": torch.float8_e5m2, "dtype": torch.float8_e4m3fn, "descales": "qkv"},
    **{f"address of {name}": {"moved": name, "offset": 1} for name in ("q", "k_cache", "v_cache", "block_table", "cache_seqlens")},
    "address of out": {"out": True, "moved": "out", "offset": 1},
    **{f"strides of {name}": {"moved": name, "pad": 8} for name in ("q", "k_cache", "v_cache", "block_table")},
    **{
        name: {"numbers": numbers}
        for name, numbers in {
            "LSE": {"return_softmax_lse": True},
            "scale": {"softmax_scale": 0.5},
            "causal": {"causal": True},
            "window": {"window_size": (3, 0)},
            "sink tokens": {"window_size": (3, 0), "sink_tokens": 2},
            "softcap": {"softcap": 5.0},
            "one split": {"num_splits": 1},
            "four splits": {"num_splits": 4},
            "four splits, LSE": {"num_splits": 4, "return_softmax_lse": True},
            "batch_invariant": {"batch_invariant": True},
        }.items()
    },
}
