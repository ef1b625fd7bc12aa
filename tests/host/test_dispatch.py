from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import atomr_accel_flashattn as fa
from atomr_accel_flashattn.dispatch import Cell, arch_of_capability, cells, resolve
from atomr_accel_flashattn.errors import ArchUnsupportedError, DispatchError, FeatureNotBuiltError
from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskSpec
from atomr_accel_flashattn.kernels.forward import ForwardSpec
from atomr_accel_flashattn.kernels.spec import Family, Tile
from atomr_accel_flashattn.launch.driver import device_count
from atomr_accel_flashattn.limits import HEAD_DIM_WIDTHS
from atomr_accel_flashattn.types import Device, DType, SmArch

GPU_ARCHS = [arch for arch in SmArch if arch is not SmArch.CPU]
MMA_ARCHS = [arch for arch in GPU_ARCHS if arch is not SmArch.SM_90A]
sides = st.integers(-3, 10_000)
TILE = Tile(block_m=128, block_n=64, warps=4, min_blocks=2)
# What a key is made of, right or wrong; what is not built and tiles that do not fit are among it.
any_extras = st.fixed_dictionaries(
    {},
    optional={
        "v_head_dim": st.none() | st.integers(-8, 300),
        "v_dtype": st.none() | st.sampled_from(DType),
        "out_dtype": st.none() | st.sampled_from(DType),
        "softcap": st.floats() | st.just(0.0),
        "dropout": st.booleans(),
        "learned_sink": st.booleans(),
        "direction": st.sampled_from(["fwd", "bwd", "dropout_mask", "merge_states"]),
        "deterministic": st.booleans(),
        "head_split": st.booleans(),
        "split": st.booleans(),
        "scheduled": st.booleans(),
        "kv_layout": st.sampled_from(["NHD", "HND", "VLLM_V1"]),
        "left_pad": st.booleans(),
        "kv_cache": st.booleans(),
        "batch_invariant": st.booleans(),
        "load_align": st.integers(-1, 32),
        "scale_first": st.booleans(),
        "short_q": st.booleans(),
        "family": st.none() | st.sampled_from(fa.Family),
        "pack_gqa": st.booleans(),
        "persistent": st.sampled_from([None, False, True]),
        "persistent_blocks": st.none() | st.integers(0, 9),
        "tiles_for": st.none() | st.sampled_from(SmArch),
        "tile": st.none() | st.sampled_from([TILE, Tile(block_m=128, block_n=128, warps=12, stages=2), replace(TILE, warps=0)]),
    },
)
parts_of_keys = st.fixed_dictionaries(
    {
        "arch": st.sampled_from(SmArch),
        "dtype": st.sampled_from(DType),
        "head_dim": st.integers(-8, 300) | st.sampled_from(HEAD_DIM_WIDTHS),
    },
    optional={
        "causal": st.booleans(),
        "varlen": st.booleans(),
        "sliding_window": st.none() | st.tuples(sides, sides),
        "alibi": st.booleans(),
        "sink": st.integers(-1, 8),
        "paged": st.booleans(),
        "gqa_ratio": st.integers(-1, 16),
        "extras": any_extras,
    },
)
# Keys that can be made: one thing at a time beside what is built.
keys = st.builds(
    fa.DispatchKey,
    arch=st.sampled_from(SmArch),
    dtype=st.sampled_from(DType),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    causal=st.booleans(),
    varlen=st.booleans(),
    sliding_window=st.none() | st.tuples(st.integers(-1, 9000), st.integers(-1, 9000)),
    alibi=st.booleans(),
    paged=st.sampled_from([False] * 9 + [True]),
    gqa_ratio=st.integers(1, 16),
    extras=st.builds(
        fa.Extras,
        v_head_dim=st.none() | st.integers(1, 32).map(lambda n: 8 * n),
        v_dtype=st.none() | st.sampled_from([None, None, *DType]),
        out_dtype=st.none() | st.sampled_from([None, None, *DType]),
        softcap=st.floats(0, 100),
        dropout=st.booleans(),
        direction=st.sampled_from(["fwd"] * 6 + ["bwd", "dropout_mask", "merge_states"]),
        split=st.sampled_from([False] * 9 + [True]),
        kv_layout=st.sampled_from(["NHD"] * 8 + ["HND", "VLLM_V1"]),
        left_pad=st.sampled_from([False] * 9 + [True]),
        load_align=st.sampled_from([2, 8, 16]),
        short_q=st.booleans(),
        family=st.none() | st.sampled_from(fa.Family),
        pack_gqa=st.booleans(),
        persistent=st.sampled_from([None, False, True]),
        tiles_for=st.sampled_from([None] * 6 + [*SmArch]),
    ),
)
built_keys = st.builds(
    fa.DispatchKey,
    arch=st.sampled_from(GPU_ARCHS),
    dtype=st.sampled_from([DType.F16, DType.BF16]),
    head_dim=st.integers(1, 32).map(lambda n: 8 * n),
    causal=st.booleans(),
    varlen=st.booleans(),
    sliding_window=st.tuples(st.integers(0, 9000), st.integers(-1, 9000)),
    alibi=st.booleans(),
    sink=st.integers(0, 8),
    gqa_ratio=st.integers(1, 16),
    extras=st.builds(
        fa.Extras,
        v_head_dim=st.none() | st.integers(1, 32).map(lambda n: 8 * n),
        softcap=st.floats(0, 100),
        dropout=st.booleans(),
        learned_sink=st.booleans(),
        load_align=st.sampled_from([2, 4, 8, 16]),
        scale_first=st.booleans(),
        short_q=st.booleans(),
    ),
)


def outcome(key: fa.DispatchKey) -> object:
    """The spec, or the text of the refusal."""
    try:
        return fa.lookup(key)
    except DispatchError as refusal:
        return str(refusal)


def made_of(parts: dict[str, Any]) -> fa.DispatchKey | str:
    """The key, or the text of the refusal."""
    try:
        return fa.DispatchKey(**{**parts, "extras": fa.Extras(**parts.get("extras", {}))})
    except DispatchError as refusal:
        return str(refusal)


@given(parts_of_keys)
@settings(max_examples=1000, deadline=None)
def test_what_a_key_is_made_of_gives_a_spec_or_a_dispatch_error_and_the_same_twice(parts: dict[str, Any]):
    key = made_of(parts)
    if isinstance(key, str):
        assert made_of(parts) == key
        return
    first = outcome(key)
    assert isinstance(first, fa.KernelSpec | fa.CpuSpec | str)
    assert outcome(replace(key)) == first


@given(keys)
@settings(max_examples=500, deadline=None)
def test_a_key_is_in_the_table_if_and_only_if_lookup_succeeds(key: fa.DispatchKey):
    found = outcome(key)
    cell = Cell.of(key)
    assert (key in fa.DISPATCH_TABLE) == (not isinstance(found, str)) == cell.built
    assert fa.DISPATCH_TABLE.get(key) == cell.spec == (None if isinstance(found, str) else found)
    if isinstance(found, str):
        with pytest.raises(KeyError) as caught:
            fa.DISPATCH_TABLE[key]
        assert isinstance(caught.value.__cause__, DispatchError)
        assert str(caught.value.__cause__) == str(cell.refusal) == found
    else:
        assert fa.DISPATCH_TABLE[key] == found
        assert cell.refusal is None


@pytest.mark.parametrize("thing", [None, "cell", 3, (), [], {}, fa.Extras()])
def test_what_is_no_key_is_not_in_the_table(thing: Any):
    assert thing not in fa.DISPATCH_TABLE
    with pytest.raises((KeyError, TypeError)):
        fa.DISPATCH_TABLE[thing]


# No st.text: its table of all characters is a file that processes race for.
junk = (
    st.none()
    | st.sampled_from(["", "0", "fa2", "sm_90", "é\n", "fwd", "NHD", np.True_, np.float32(2), np.int64(8), np.zeros(()), np.zeros(2)])
    | st.floats()
    | st.integers()
    | st.booleans()
    | st.complex_numbers()
    | st.lists(st.integers(), max_size=3)
    | st.tuples(st.lists(st.integers(), max_size=1), st.integers())
    | st.binary(max_size=2)
    | st.dictionaries(st.sampled_from(["", "a", "arch"]), st.sampled_from(["", "b"]))
    | st.builds(lambda size, flag: replace(TILE, block_m=size, persistent=flag), st.lists(st.integers()) | st.text("1x"), st.none())
)


def changed(key: fa.DispatchKey, name: str, value: Any) -> fa.DispatchKey:
    """``key`` with another value of a field of its own, or of its extras."""
    of_extras = name in fa.Extras.__slots__
    return replace(key, extras=replace(key.extras, **{name: value})) if of_extras else replace(key, **{name: value})


@given(built_keys, st.sampled_from([*fa.DispatchKey.__slots__, *fa.Extras.__slots__]), junk)
@settings(max_examples=1000, deadline=None)
def test_a_value_of_any_type_is_looked_up_or_refused_and_raises_nothing_else(key: fa.DispatchKey, name: str, value: Any):
    try:
        key = changed(key, name, value)
    except DispatchError:
        return
    assert isinstance(outcome(key), fa.KernelSpec | str)
    assert hash(key) == hash(replace(key))


WRONG: dict[str, tuple[Any, ...]] = {
    "arch": (None, "sm_90", fa.Family.FA2),
    "dtype": (None, "f16", np.float16),
    "head_dim": (None, 0, -8, 12, 264, 64.0, True, "64"),
    "causal": (None, 1, "False", np.True_),
    "varlen": (None, 0, "yes"),
    "sliding_window": (5, (), (1,), (1, 2, 3), [3, 0], (-2, 0), (0.5, 0), (None, 0), (True, 0)),
    "alibi": (None, 1.0, np.ones(4)),
    "sink": (None, -1, 1.0, True),
    "paged": (None, "no"),
    "gqa_ratio": (None, 0, -1, 2.0, True),
    "extras": (None, {}, fa.DispatchKey(SmArch.CPU, DType.F16, 8)),
    "v_head_dim": (0, -8, 12, 264, 64.0, True),
    "k_dtype": ("f16", 3),
    "v_dtype": ("f16", 3),
    "out_dtype": ("f16", 3),
    "q_descale": ("tensor", 1, fa.ScaleUnit.TOKEN),
    "k_descale": ("tensor", 1),
    "v_descale": ("tensor", 1),
    "softcap": (None, -1.0, math.nan, math.inf, True, "3", 3 + 0j),
    "dropout": (None, 0.1, 1),
    "learned_sink": (None, np.zeros(4)),
    "direction": (None, "sideways", 3),
    "deterministic": (None, 1, "yes"),
    "head_split": (None, 4, "yes"),
    "split": (None, 2),
    "scheduled": (None, "yes"),
    "kv_layout": (None, 3),
    "left_pad": (None, "left"),
    "kv_cache": (None, 1),
    "cache_rows": (None, 8, 17, 256, 16.0),
    "batch_invariant": (None, "yes"),
    "load_align": (None, 0, -16, 16.0, True),
    "scale_first": (None, -1),
    "single_level": (None, 1),
    "family": ("fa2", 3),
    "pack_gqa": (None, 1, "yes"),
    "persistent": (1, "yes", np.False_),
    "persistent_blocks": (0, -1, 3, 1.5, True),
    "tiles_for": ("sm_80", 86),
    "short_q": (None, 8),
    "few_rows": (None, 1),
    "tile": ("m128n64w4s1b2", 128, replace(TILE, block_m="128"), replace(TILE, stages=[1]), replace(TILE, persistent=1)),
}


@pytest.mark.parametrize("name", [*fa.DispatchKey.__slots__, *fa.Extras.__slots__])
def test_a_key_with_a_wrong_value_cannot_be_made_and_the_refusal_names_the_field(name: str):
    for value in WRONG[name]:
        with pytest.raises(DispatchError, match=f"^{name}: got .*; allowed"):
            changed(replace(PLAIN, arch=SmArch.SM_90), name, value)


def test_values_that_contradict_each_other_make_no_key():
    for extras in ({"persistent_blocks": 3}, {"persistent_blocks": 3, "persistent": False}, {"tile": TILE, "tiles_for": SmArch.SM_80}):
        with pytest.raises(DispatchError):
            fa.Extras(**extras)
    assert fa.Extras(persistent_blocks=3, persistent=True).persistent_blocks == 3
    for window in (None, (-1, 0), (-1, 9)):
        with pytest.raises(DispatchError, match="sink: got 4 with sliding_window"):
            replace(PLAIN, sliding_window=window, sink=4)


def test_a_key_moves_to_another_arch():
    """What may be packed on one is not where nothing packs."""
    packed = replace(PLAIN, arch=SmArch.SM_90A, gqa_ratio=4)
    assert packed.packs_heads
    for change in ({"arch": SmArch.SM_90}, {"gqa_ratio": 3}, {"gqa_ratio": 1}, {"alibi": True}):
        assert not replace(packed, **change).packs_heads
        fa.lookup(replace(packed, **change))


@pytest.mark.parametrize("value", [None, "fa2", ("sm_90", "f16", 64), fa.Extras()])
def test_lookup_of_no_key_at_all(value: Any):
    with pytest.raises(DispatchError, match=f"got {type(value).__qualname__}; allowed is a DispatchKey"):
        fa.lookup(value)


@given(built_keys)
@settings(max_examples=500, deadline=None)
def test_every_combination_of_built_features_has_a_kernel_that_fits_its_arch(key: fa.DispatchKey):
    spec = fa.lookup(key)
    assert isinstance(spec, fa.KernelSpec)
    assert spec.shared_memory <= key.arch.shared_memory_per_block
    assert spec.head_dim == min(width for width in HEAD_DIM_WIDTHS if width >= key.head_dim)
    assert spec.v_head_dim == min(width for width in HEAD_DIM_WIDTHS if width >= key.v_head_dim)
    assert spec.exact_head_dim == ((spec.head_dim, spec.v_head_dim) == (key.head_dim, key.v_head_dim))
    assert (spec.left_bound, spec.right_bound) == (True, key.causal or key.sliding_window[1] >= 0)
    assert spec.sink_tokens == (key.sink > 0)
    assert spec.aligned == (key.extras.load_align == 16)


@given(built_keys, st.integers(0, 9000), st.integers(1, 99), st.floats(0.5, 50), st.integers(1, 8))
@settings(max_examples=300, deadline=None)
def test_numbers_do_not_change_the_kernel(key: fa.DispatchKey, left: int, ratio: int, cap: float, sink: int):
    other = replace(
        key,
        sliding_window=(left, key.sliding_window[1]),
        gqa_ratio=ratio,
        sink=sink if key.sink else 0,
        extras=replace(key.extras, softcap=cap if key.extras.softcap else 0.0),
    )
    spec = fa.lookup(key)
    assert isinstance(spec, fa.KernelSpec)
    assert fa.lookup(other) == replace(spec, pack_gqa=other.packs_heads)  # of the ratio, whether it packs and nothing else


PACKED = fa.DispatchKey(SmArch.SM_90A, DType.BF16, 128, gqa_ratio=4)


def packs(key: fa.DispatchKey) -> bool:
    spec = fa.lookup(key)
    assert isinstance(spec, fa.KernelSpec)
    assert spec.pack_gqa == ("packgqa" in spec.kernel_name)
    return spec.pack_gqa


@pytest.mark.parametrize("ratio", [*range(1, 18), 24, 31, 32, 33, 48, 63, 64, 65, 96, 128])
def test_query_heads_are_packed_where_their_number_divides_the_rows_of_a_warpgroup(ratio: int):
    assert packs(replace(PACKED, gqa_ratio=ratio)) == (ratio in {2, 4, 8, 16, 32, 64})


@pytest.mark.parametrize("arch", GPU_ARCHS)
@pytest.mark.parametrize(
    ("changes", "extras", "packed"),
    [
        pytest.param({"causal": True, "varlen": True}, {}, True, id="causal varlen"),
        pytest.param(
            {"sliding_window": (64, 0), "sink": 4}, {"learned_sink": True, "softcap": 30.0, "scale_first": True}, True, id="scores"
        ),
        pytest.param({"head_dim": 192}, {"v_head_dim": 128, "short_q": True, "persistent": False}, True, id="tiles"),
        pytest.param({"alibi": True}, {}, False, id="a slope per head"),
        pytest.param({}, {"dropout": True}, False, id="a pattern per head"),
        pytest.param({}, {"family": fa.Family.FA2}, False, id="mma.sync demanded"),
        pytest.param({}, {"load_align": 8}, False, id="no TMA: odd address"),
        pytest.param({}, {"pack_gqa": False}, False, id="not packed, on demand"),
        pytest.param({}, {"tiles_for": SmArch.SM_80}, False, id="tiles of mma.sync"),
    ],
)
def test_query_heads_are_packed_in_the_wgmma_family_unless_something_differs_between_them(
    arch: Any, changes: dict[str, Any], extras: dict[str, Any], packed: bool
):
    key = replace(PACKED, arch=arch, extras=fa.Extras(**extras), **changes)
    if extras.get("tiles_for") and fa.lookup(replace(PACKED, arch=SmArch.SM_80)).shared_memory > arch.shared_memory_per_block:  # type: ignore[union-attr]
        pytest.skip("the tile does not fit")
    assert packs(key) == (packed and arch is SmArch.SM_90A)


@given(built_keys, st.sampled_from(["alibi", "varlen", "dropout", "learned_sink", "scale_first", "aligned", "softcap", "sink_tokens"]))
@settings(max_examples=300, deadline=None)
def test_presence_changes_the_kernel(key: fa.DispatchKey, feature: str):
    spec = fa.lookup(key)
    present = getattr(spec, feature)
    changes: dict[str, Any] = {
        "alibi": {"alibi": not present},
        "varlen": {"varlen": not present},
        "sink_tokens": {"sink": 0 if present else 1},
        "dropout": {"extras": replace(key.extras, dropout=not present)},
        "learned_sink": {"extras": replace(key.extras, learned_sink=not present)},
        "scale_first": {"extras": replace(key.extras, scale_first=not present)},
        "aligned": {"extras": replace(key.extras, load_align=8 if present else 16)},
        "softcap": {"extras": replace(key.extras, softcap=0.0 if present else 1.0)},
    }
    other = fa.lookup(replace(key, **changes[feature]))
    assert getattr(other, feature) is not present
    assert other.kernel_name != spec.kernel_name


@given(keys)
def test_keys_and_specs_survive_pickling(key: fa.DispatchKey):
    assert pickle.loads(pickle.dumps(key)) == key  # noqa: S301 - our own bytes
    spec = outcome(key)
    assert pickle.loads(pickle.dumps(spec)) == spec  # noqa: S301


PLAIN = fa.DispatchKey(SmArch.SM_90, DType.F16, 128)


@pytest.mark.parametrize(
    ("feature", "key"),
    [
        ("fp8_backward", replace(PLAIN, dtype=DType.F8E4M3, extras=fa.Extras(direction="bwd"))),
        ("fa3_backward", replace(PLAIN, arch=SmArch.SM_90A, extras=fa.Extras(direction="bwd", family=Family.FA3))),
        ("split", replace(PLAIN, extras=fa.Extras(split=True, dropout=True))),
        ("split", replace(PLAIN, arch=SmArch.SM_90A, dtype=DType.F8E4M3, extras=fa.Extras(split=True))),
        ("left_pad", replace(PLAIN, extras=fa.Extras(left_pad=True))),
        ("kv_layout", replace(PLAIN, paged=True, extras=fa.Extras(kv_layout="VLLM_V1"))),
        ("k_dtype", replace(PLAIN, extras=fa.Extras(k_dtype=DType.BF16))),
        ("v_dtype", replace(PLAIN, extras=fa.Extras(v_dtype=DType.BF16))),
        ("out_dtype", replace(PLAIN, extras=fa.Extras(out_dtype=DType.F32))),
        ("invariant_dropout", replace(PLAIN, extras=fa.Extras(batch_invariant=True, dropout=True))),
        ("fa3_batch_invariant", replace(PLAIN, arch=SmArch.SM_90A, extras=fa.Extras(batch_invariant=True, family=Family.FA3))),
        ("kv_layout", replace(PLAIN, arch=SmArch.CPU, paged=True, extras=fa.Extras(kv_layout="VLLM_V1"))),
        ("paged_backward", replace(PLAIN, arch=SmArch.CPU, paged=True, extras=fa.Extras(direction="bwd"))),
    ],
)
def test_what_is_not_built_is_refused_by_name(feature: str, key: fa.DispatchKey):
    with pytest.raises(FeatureNotBuiltError, match=f"'{feature}' is not built") as raised:
        fa.lookup(key)
    assert raised.value.feature == feature


@pytest.mark.parametrize("extras", [{"direction": "bwd"}, {"tile": TILE}], ids=str)
def test_a_batch_invariant_call_has_one_direction_and_one_tile(extras: dict[str, Any]):
    with pytest.raises(DispatchError, match=f"batch_invariant: got it with (a backward|tile {TILE})"):
        fa.lookup(replace(PLAIN, extras=fa.Extras(batch_invariant=True, **extras)))


@pytest.mark.parametrize("arch", GPU_ARCHS)
def test_batch_invariant_tiles_cut_the_keys_alike_for_every_number_of_rows(arch: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resolve, "saved_tile", lambda *_, **__: TILE)  # a tuned one would be another
    resolve._resolve.cache_clear()
    for width in HEAD_DIM_WIDTHS:
        extras = [fa.Extras(batch_invariant=True, cache_rows=rows) for rows in (16, 32, 64, 128)]
        specs: list[Any] = [fa.lookup(fa.DispatchKey(arch, DType.F16, width, extras=each)) for each in extras]
        assert len({(spec.tile.block_n, spec.tile.warps / spec.tile.block_m) for spec in specs}) == 1
        assert {(spec.tile.warps * 16 // spec.tile.block_m, spec.family) for spec in specs} == {(4, Family.FA2)}
        assert not any(spec.misfit() or spec.shared_memory > arch.shared_memory_per_block for spec in specs)
        wrong = replace(specs[0], tile=replace(specs[0].tile, warps=8))
        assert "4 groups" in wrong.misfit()


CACHED = fa.DispatchKey(SmArch.CPU, DType.F16, 128, paged=True)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (replace(CACHED, extras=fa.Extras(dropout=True)), "dropout: got dropout with a KV cache"),
        (replace(CACHED, extras=fa.Extras(left_pad=True)), "left_pad: got left padding"),
        (replace(CACHED, extras=fa.Extras(split=True, batch_invariant=True)), "split: got split KV with batch_invariant"),
        (replace(CACHED, extras=fa.Extras(scheduled=True, split=True)), "scheduled: got a StepPlan with split"),
        (replace(CACHED, extras=fa.Extras(scheduled=True, batch_invariant=True)), "scheduled: got a StepPlan with batch_invariant"),
        (
            replace(CACHED, extras=fa.Extras(scheduled=True, tile=TILE)),
            "scheduled: got a StepPlan with tile .*; allowed is the tile that the plan",
        ),
    ],
    ids=["dropout", "left_pad", "split", "scheduled", "scheduled and invariant", "scheduled and a tile"],
)
def test_what_no_cache_has_is_refused(key: fa.DispatchKey, message: str):
    with pytest.raises(DispatchError, match=message):
        fa.lookup(key)


@pytest.mark.parametrize("arch", GPU_ARCHS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.F64])
def test_wide_types_are_refused_on_gpus(arch: Any, dtype: Any):
    with pytest.raises(ArchUnsupportedError, match=f"got {dtype.value} on {arch.value}; allowed there are f16, bf16"):
        fa.lookup(fa.DispatchKey(arch, dtype, 64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 12}, "head_dim: got 12; allowed is a multiple of 8 up to 256"),
        ({"head_dim": 264}, "head_dim: got 264"),
        ({"v_head_dim": 0}, "v_head_dim: got 0"),
        ({"arch": SmArch.CPU, "head_dim": 257}, "1..256 on the CPU"),
        ({"sliding_window": (-2, 0)}, "sliding_window: got (-2, 0)"),
        ({"sliding_window": 5}, "sliding_window: got 5; allowed is None or (left, right)"),
        ({"causal": "False"}, "causal: got 'False'; allowed is True or False"),
        ({"dropout": 0.1}, "dropout: got 0.1; allowed is True or False"),
        ({"gqa_ratio": 0}, "gqa_ratio: got 0; allowed is an integer >= 1"),
        ({"sink": 4}, "sink: got 4 with sliding_window=None"),
        ({"softcap": math.nan}, "softcap: got nan"),
        ({"load_align": 0}, "load_align: got 0"),
        ({"persistent": "yes"}, "persistent: got 'yes'; allowed is None, True or False"),
        ({"persistent_blocks": 3}, "persistent_blocks: got 3; allowed is None, or an integer >= 1 with persistent"),
        ({"direction": "sideways"}, "direction: got 'sideways'; allowed is 'fwd', 'bwd', 'dropout_mask' or 'merge_states'"),
    ],
    ids=str,
)
def test_the_refusal_of_a_key_says_what_is_allowed(changes: dict[str, Any], message: str):
    with pytest.raises(DispatchError) as raised:
        fa.DispatchKey(
            **{"arch": SmArch.SM_90, "dtype": DType.F16, "head_dim": 128}
            | {name: value for name, value in changes.items() if name in fa.DispatchKey.__slots__},
            extras=fa.Extras(**{name: value for name, value in changes.items() if name in fa.Extras.__slots__}),
        )
    assert message in str(raised.value)


def test_tiles_that_do_not_fit_are_refused():
    refused = []
    for tiles_for in MMA_ARCHS:
        for arch in MMA_ARCHS:
            for width in HEAD_DIM_WIDTHS:
                key = fa.DispatchKey(arch, DType.F16, width, extras=fa.Extras(tiles_for=tiles_for))
                try:
                    spec = fa.lookup(key)
                    assert spec.tile == fa.lookup(fa.DispatchKey(tiles_for, DType.F16, width)).tile
                except ArchUnsupportedError as error:
                    refused.append(str(error))
    assert all("bytes of shared memory" in text and "per block" in text for text in refused)
    with_room = fa.DispatchKey(SmArch.SM_90, DType.F16, 128, extras=fa.Extras(tiles_for=SmArch.SM_86))
    assert fa.lookup(with_room).arch is SmArch.SM_90


def test_the_cpu_does_everything_with_one_row():
    for dtype in (DType.F16, DType.BF16, DType.F32, DType.F64):
        spec = fa.lookup(
            fa.DispatchKey(SmArch.CPU, dtype, 61, causal=True, varlen=True, alibi=True, extras=fa.Extras(softcap=30.0, dropout=True))
        )
        assert (spec.kernel_name, spec.arch, spec.dtype) == ("reference_cpu", SmArch.CPU, dtype)


def test_the_dropout_mask_is_one_kernel_for_all_types_and_head_dims():
    mask = fa.Extras(direction="dropout_mask", dropout=True)
    specs = {
        fa.lookup(fa.DispatchKey(SmArch.SM_90, dtype, width, extras=mask)) for dtype in (DType.F16, DType.BF16) for width in (8, 64, 256)
    }
    assert len(specs) == 1
    assert specs.pop() == DropoutMaskSpec(arch=SmArch.SM_90)
    assert fa.lookup(fa.DispatchKey(SmArch.SM_90A, DType.F16, 64, varlen=True, extras=mask)).kernel_name == "dropout_mask_sm90_varlen"


class TestTable:
    def test_iterating_visits_what_is_built_of_every_feature_and_arch_and_only_once(self):
        keys = list(fa.DISPATCH_TABLE)
        assert len(keys) == len(set(keys)) == len(fa.DISPATCH_TABLE)
        assert {key.arch for key in keys} == set(SmArch)
        assert {key.dtype for key in keys} == set(DType)
        assert all(isinstance(spec, fa.KernelSpec | fa.CpuSpec) for spec in fa.DISPATCH_TABLE.values())
        assert all(key in fa.DISPATCH_TABLE for key in keys)

    def test_a_cell_is_built_or_refused_with_a_reason(self):
        every = cells()
        assert {cell.key.dtype for cell in every} == set(DType)
        for cell in every:
            assert cell.built == (cell.refusal is None) == (cell.spec is not None)
            assert cell.built or len(str(cell.refusal)) > 20
        assert [cell.key for cell in every if cell.built] == list(fa.DISPATCH_TABLE)

    def test_features_combine(self):
        cell = fa.DISPATCH_TABLE.cell(SmArch.SM_80, DType.BF16, 64, ["sliding_full", "sink_tokens", "alibi", "varlen", "dropout"])
        assert cell.spec is not None
        assert cell.spec.kernel_name.endswith("leftbound_rightbound_sinktokens_alibi_dropout_varlen")
        assert cell.key in fa.DISPATCH_TABLE

    def test_an_unknown_feature_is_refused_with_the_list(self):
        with pytest.raises(DispatchError, match="got 'flash'; allowed are full, causal"):
            fa.with_features(PLAIN, ["flash"])


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
    ],
)
def test_arch_of_a_card(capability: tuple[int, int], arch: Any):
    assert arch_of_capability(*capability) is SmArch(arch)


@pytest.mark.parametrize("capability", [(7, 5), (6, 1), (11, 0), (13, 0), (8, 8)])
def test_a_card_without_kernels_is_refused(capability: tuple[int, int]):
    with pytest.raises(ArchUnsupportedError, match=rf"got {capability[0]}\.{capability[1]}; allowed are 8\.0.*CPU backend"):
        arch_of_capability(*capability)


def test_best_arch_of_the_host_and_of_a_gpu_that_is_not_there():
    assert fa.best_arch(Device("cpu", 0)) is SmArch.CPU
    if not device_count():
        with pytest.raises(fa.NoDriverError, match="driver"):
            fa.best_arch(Device("cuda", 0))


def test_markers_are_gemm_types():
    markers = {fa.F16: DType.F16, fa.Bf16: DType.BF16, fa.F8E4m3: DType.F8E4M3, fa.F8E5m2: DType.F8E5M2}
    for marker, dtype in markers.items():
        assert marker.dtype is dtype
        assert isinstance(marker, fa.GemmSupported)
        assert isinstance(marker(), fa.GemmSupported)
    assert not isinstance(object(), fa.GemmSupported)


def test_requests_are_forward_dispatch_and_nothing_more():
    q = np.zeros((1, 2, 2, 8), np.float16)
    dense = fa.Fa2FwdRequest(q, q, q)
    packed = fa.VarlenFwdRequest(q[0], q[0], q[0], cu_seqlens_q=fa.CumulativeSeqlens.from_lengths([2]))
    for request in (dense, packed):
        assert isinstance(request, fa.FaFwdDispatch)
        assert not isinstance(request, fa.FaPagedFwdDispatch | fa.FaBwdDispatch)


class TestKeyOfRequest:
    def key(self, **kwargs: Any):
        q, k, v = np.zeros((2, 6, 4, 64), np.float16), np.zeros((2, 9, 2, 64), np.float16), np.zeros((2, 9, 2, 32), np.float16)
        return fa.Fa2FwdRequest(q, k, v, **kwargs).dispatch_key(SmArch.SM_90)

    @pytest.mark.parametrize(
        ("mask", "causal", "window"),
        [
            (fa.MaskKind.full(), False, None),
            (fa.MaskKind.causal(), True, None),
            (fa.MaskKind.sliding_causal(4), True, (3, 0)),
            (fa.MaskKind.sliding_full(4), False, (3, 3)),
            (fa.MaskKind.window(-1, 5), False, (-1, 5)),
            (fa.MaskKind.window(5, -1), False, (5, -1)),
            (fa.MaskKind.window(0, 0), True, (0, 0)),
            (fa.MaskKind.window(2**40, 2**40), False, (2**30 - 1, 2**30 - 1)),
        ],
    )
    def test_mask(self, mask: fa.MaskKind, causal: bool, window: Any):
        key = self.key(mask=mask)
        assert (key.causal, key.sliding_window) == (causal, window)
        spec = fa.lookup(key)
        assert (spec.left_bound, spec.right_bound) == (mask.left is not None, mask.right is not None)

    def test_the_rest(self):
        options = fa.AttentionOptions(softmax_scale=-1.0, softcap=5.0, learned_sink=np.zeros(4, np.float32), dropout_p=0.1)
        slopes = fa.PositionBias.alibi(np.zeros((2, 4), np.float32))
        key = self.key(options=options, bias=slopes, mask=fa.MaskKind.sliding_causal(2), sink_tokens=3)
        assert (key.arch, key.dtype, key.head_dim, key.v_head_dim, key.gqa_ratio, key.sink) == (SmArch.SM_90, DType.F16, 64, 32, 2, 3)
        assert key.alibi
        assert key.extras.learned_sink
        assert key.extras.dropout
        assert key.extras.scale_first
        assert key.extras.softcap == 5.0

    @pytest.mark.parametrize("scale", [0.0, 1e-50, 1e-30])
    def test_scales_that_are_not_or_hardly_positive_need_scale_first(self, scale: float):
        assert self.key(options=fa.AttentionOptions(softmax_scale=scale)).extras.scale_first

    def test_other_positive_scales_do_not(self):
        assert not self.key(options=fa.AttentionOptions(softmax_scale=1e-9)).extras.scale_first


@pytest.mark.parametrize(("offset", "align"), [(0, 16), (1, 2), (2, 4), (4, 8), (8, 16)])
@pytest.mark.parametrize("which", ["q", "k", "v", "out"])
def test_alignment_is_that_of_the_worst_address(offset: int, align: int, which: str):
    arrays = {name: aligned((1, 4, 2, 64), 0) for name in ("q", "k", "v", "out")}
    arrays[which] = aligned((1, 4, 2, 64), offset)
    assert fa.Fa2FwdRequest(**arrays).dispatch_key(SmArch.SM_90).extras.load_align == align


@pytest.mark.parametrize(("row", "align"), [(128, 16), (129, 2), (130, 4), (132, 8), (136, 16)])
def test_alignment_is_that_of_the_worst_stride(row: int, align: int):
    q = aligned((1, 4, 2, 64), 0)
    wide = np.lib.stride_tricks.as_strided(aligned((8 * row,), 0), (1, 4, 2, 64), (0, 2 * row, 128, 2))
    assert fa.Fa2FwdRequest(q, wide, q).dispatch_key(SmArch.SM_90).extras.load_align == align


def test_a_stride_that_is_never_stepped_does_not_count():
    q = np.lib.stride_tricks.as_strided(aligned((256,), 0), (1, 1, 2, 64), (2, 6, 128, 2))
    request = fa.Fa2FwdRequest(q, q, q)
    assert request.dispatch_key(SmArch.SM_90).extras.load_align == 16
    assert request.problem.q_strides == (0, 0, 64)  # not even as the step to a row past the end


def aligned(shape: tuple[int, ...], offset: int) -> np.ndarray:
    """Zeros in float16 whose first element lies ``offset`` elements after a multiple of 16 bytes."""
    size = int(np.prod(shape))
    storage = np.zeros(size + 32, np.float16)
    start = -storage.ctypes.data % 16 // 2 + offset
    return storage[start : start + size].reshape(shape)


FEATURES_OF_REGISTERS = {
    "causal": {"causal": True},
    "window": {"sliding_window": (64, -1)},
    "varlen": {"varlen": True},
    "alibi": {"alibi": True},
    "softcap": {"extras": fa.Extras(softcap=30.0)},
    "scale_first": {"extras": fa.Extras(scale_first=True)},
    "dropout": {"extras": fa.Extras(dropout=True)},
    "unaligned": {"extras": fa.Extras(load_align=8)},
    "padded": {"head_dim": 56},
    "padded_v": {"extras": fa.Extras(v_head_dim=56)},
}


@pytest.mark.parametrize("change", FEATURES_OF_REGISTERS.values(), ids=FEATURES_OF_REGISTERS)
@pytest.mark.parametrize("arch", MMA_ARCHS)
def test_a_plain_kernel_of_width_64_has_the_registers_for_more_keys(arch: SmArch, change: dict[str, Any]):
    plain = replace(PLAIN, arch=arch, head_dim=64)
    keys = [fa.lookup(key).tile.block_n for key in (plain, replace(plain, gqa_ratio=4), replace(plain, **change))]
    assert keys == [128, 128, 64]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("arch", MMA_ARCHS)
def test_width_256_takes_two_blocks_where_a_multiprocessor_has_the_memory(arch: SmArch, dropout: bool):
    key = replace(PLAIN, arch=arch, head_dim=256, extras=fa.Extras(dropout=dropout))
    assert fa.lookup(key).tile.min_blocks == (2 if arch.shared_memory_per_sm >= 228 * 1024 else 1)
    assert fa.lookup(key) == fa.lookup(replace(key, extras=replace(key.extras, short_q=True)))


@given(built_keys)
@settings(max_examples=500, deadline=None)
def test_as_many_blocks_fit_the_memory_of_a_multiprocessor_as_a_tile_asks_for(key: fa.DispatchKey):
    spec = fa.lookup(replace(key, extras=replace(key.extras, family=fa.Family.FA2)))
    assert spec.tile.min_blocks * (spec.shared_memory + 1024) <= spec.arch.shared_memory_per_sm


WGMMA = replace(PLAIN, arch=SmArch.SM_90A)


def test_hopper_resolves_to_wgmma():
    spec = fa.lookup(WGMMA)
    assert (spec.family, spec.arch, spec.expected_instructions) == (fa.Family.FA3, SmArch.SM_90A, ("HGMMA", "UTMALDG", "SYNCS"))


@pytest.mark.parametrize(
    "extras",
    [fa.Extras(family=fa.Family.FA2), fa.Extras(load_align=8), fa.Extras(tiles_for=SmArch.SM_86)],
    ids=["asked_for", "unaligned", "borrowed tiles"],
)
def test_hopper_takes_the_other_family_where_tensor_copies_cannot_or_shall_not(extras: fa.Extras):
    spec = fa.lookup(replace(WGMMA, extras=extras))
    assert (spec.family, spec.arch) == (fa.Family.FA2, SmArch.SM_90)


@pytest.mark.parametrize("arch", [SmArch.SM_100, SmArch.SM_120])
def test_an_fa3_request_resolves_to_mma_sync_where_there_is_no_wgmma(arch: SmArch):
    for persistent in (None, False, True):
        spec = fa.lookup(replace(PLAIN, arch=arch, extras=fa.Extras(family=fa.Family.FA3, persistent=persistent)))
        assert (spec.family, spec.arch, spec.tile.persistent) == (fa.Family.FA2, arch, persistent is True)


@pytest.mark.parametrize("arch", [SmArch.SM_80, SmArch.SM_86, SmArch.SM_89, SmArch.SM_90])
def test_an_fa3_request_is_refused_before_hopper(arch: SmArch):
    with pytest.raises(ArchUnsupportedError, match=f"got fa3 on {arch.value}, which has no wgmma"):
        fa.lookup(replace(PLAIN, arch=arch, extras=fa.Extras(family=fa.Family.FA3)))


@pytest.mark.parametrize("arch", [SmArch.CPU, SmArch.SM_90A])
def test_tiles_are_borrowed_from_the_mma_sync_family_only(arch: SmArch):
    with pytest.raises(ArchUnsupportedError, match=f"tiles_for: got {arch.value}; allowed are the architectures of the mma.sync family"):
        fa.lookup(replace(PLAIN, extras=fa.Extras(tiles_for=arch)))


@given(built_keys)
@settings(max_examples=300, deadline=None)
def test_every_combination_fits_a_wgmma_tile(key: fa.DispatchKey):
    spec = fa.lookup(replace(key, arch=SmArch.SM_90A, extras=replace(key.extras, tiles_for=None, load_align=16)))
    assert isinstance(spec, fa.KernelSpec)
    assert spec.family is fa.Family.FA3
    assert spec.shared_memory <= SmArch.SM_90A.shared_memory_per_block
    assert spec.tile.block_m == 64 * (spec.tile.warps // 4 - 1)
    assert not spec.dropout or spec.tile.block_n % 32 == 0


@pytest.mark.parametrize("mode", [fa.PersistentMode.Grid(), fa.PersistentMode.Persistent(7), fa.PersistentMode.auto()])
def test_fa3_request_carries_its_schedule(mode: fa.PersistentMode):
    q = np.zeros((1, 8, 2, 64), np.float16)
    key = fa.Fa3FwdRequest(q, q, q, persistent=mode).dispatch_key(SmArch.SM_90A)
    assert (key.extras.family, key.extras.persistent, key.extras.persistent_blocks) == (fa.Family.FA3, mode.persistent, mode.blocks)
    spec = fa.lookup(key)
    assert isinstance(spec, fa.KernelSpec)
    assert spec.tile.persistent == (mode.persistent is not False)


@pytest.mark.parametrize("blocks", [0, -1, 1.5, True])
def test_persistent_mode_refuses_blocks_that_make_no_sense(blocks: Any):
    with pytest.raises(fa.ScheduleError, match="allowed is a positive integer, with persistent=True"):
        fa.PersistentMode.Persistent(blocks)


def test_blocks_without_persistence_are_refused():
    with pytest.raises(fa.ScheduleError, match="got 4 blocks"):
        fa.PersistentMode(persistent=False, blocks=4)


@pytest.mark.parametrize(
    ("view", "copied"),
    [(lambda x: x, True), (lambda x: x[:, ::-1], False), (lambda x: np.broadcast_to(x[:1], (3, *x.shape[1:])), True)],
    ids=["plain", "reversed", "expanded"],
)
@pytest.mark.parametrize("request_of", [fa.DenseFwdRequest, fa.Fa3FwdRequest])
def test_a_key_names_the_family_that_can_step_through_the_arrays(view: Any, copied: bool, request_of: Any):
    q = np.zeros((3, 8, 2, 64), np.float16)
    key = request_of(q, view(q), q).dispatch_key(SmArch.SM_90A)
    family = fa.Family.FA3 if copied else fa.Family.FA2
    assert key.extras.family is key.family is fa.lookup(key).family is family


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
@pytest.mark.parametrize("arch", GPU_ARCHS)
def test_the_key_of_a_request_makes_every_choice(arch: SmArch, dtype: DType):
    """But persistence, where the SMs of the card are not known: then it is what the tile says."""
    q = np.zeros((2, 9, 8, 128), ml_dtypes.bfloat16 if dtype is DType.BF16 else np.float16)
    key = fa.DenseFwdRequest(q, q[:, :, :2], q[:, :, :2]).dispatch_key(arch)
    wgmma = arch is SmArch.SM_90A
    extras = key.extras
    assert (extras.family, key.packs_heads, extras.persistent) == (fa.Family.FA3 if wgmma else fa.Family.FA2, wgmma, None)
    assert (extras.short_q, extras.load_align, extras.tile) == (True, 16, None)
    spec = fa.lookup(key)
    assert isinstance(spec, ForwardSpec)
    assert (spec.family, spec.pack_gqa, spec.persistent) == (extras.family, wgmma, wgmma)
