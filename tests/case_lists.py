"""The lists of cases: named hazards, every head dim, the pairwise product of the features, and large ones judged on sampled rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .cases import Alibi, Case, Values
from .inputs import Layout
from .pairwise import covering_rows, covering_rows_of_few_kinds

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping

    from atomr_accel_flashattn.types import DType

__all__ = [
    "FEATURE_AXES",
    "LENGTHS",
    "MASKS",
    "emulated_cases",
    "grid_cases",
    "grouped_cases",
    "hazard_cases",
    "head_dim_cases",
    "large_cases",
    "pairwise_cases",
]

_Options = dict[str, Any]

CAUSAL: _Options = {"right": 0}
MASKS: tuple[_Options, ...] = (
    {},
    CAUSAL,
    {"left": 15, "right": 0},  # sliding causal, 16 keys
    {"left": 32, "right": 32},  # sliding full
    {"left": 7, "right": 100},
    {"left": 40},
    {"right": 5},
    {"left": 9, "right": 0, "sink_tokens": 4},
    {"left": 20, "right": 20, "sink_tokens": 70},  # the sinks fill more than one tile
)
LENGTHS: tuple[_Options, ...] = (
    {"batch": 2, "seqlen_q": 64, "seqlen_k": 64},
    {"batch": 1, "seqlen_q": 129, "seqlen_k": 129},
    {"batch": 3, "seqlen_q": 1, "seqlen_k": 257},
    {"batch": 1, "seqlen_q": 75, "seqlen_k": 310},
    {"batch": 2, "seqlen_q": 200, "seqlen_k": 67},
    {"lengths_q": (65, 0, 1, 130, 8), "lengths_k": (65, 40, 200, 0, 3)},
    {"lengths_q": (100, 31, 7), "lengths_k": (100, 31, 7)},
)
FEATURE_AXES: Mapping[str, tuple[_Options, ...]] = {
    "lengths": LENGTHS,
    "heads": tuple({"heads": q, "heads_kv": kv} for q, kv in ((2, 2), (3, 1), (6, 2), (8, 1))),
    "mask": MASKS,
    "width": tuple(
        {"head_dim": d, "v_head_dim": dv}
        for d, dv in ((64, 64), (128, 128), (32, 32), (96, 96), (256, 256), (192, 128), (40, 24), (8, 8), (80, 80), (64, 136))
    ),
    "learned_sink": ({}, {"learned_sink": True}),
    "alibi": tuple({"alibi": alibi} for alibi in Alibi),
    "softcap": ({}, {"softcap": 5.0}, {"softcap": 30.0}),
    "dropout": ({}, {"dropout_p": 0.17}),
    "scale": ({}, {"softmax_scale": 0.3}, {"softmax_scale": -0.2}, {"softmax_scale": 0.0}),
    "layout": tuple({"layout": layout} for layout in Layout),
}
# Widths that the emulator meets with all features: exact, padded, wide, and v on either side of q and k.
EMULATED_WIDTHS = tuple({"head_dim": d, "v_head_dim": dv} for d, dv in ((64, 64), (128, 128), (256, 256), (192, 128), (40, 24), (64, 136)))

# What the options of an axis make of a kernel: of those not named here, whether there are any. The rest are numbers that any kernel takes.
_KERNEL_KINDS: Mapping[str, Callable[[_Options], Hashable]] = {
    "dtype": lambda options: options["dtype"],
    "width": lambda options: (options["head_dim"], options["v_head_dim"]),
    "lengths": lambda options: "lengths_q" in options,
    "heads": lambda options: options["heads"] // options["heads_kv"] in {2, 4, 8},  # packed by the wgmma family
    "mask": lambda options: ("left" in options, "right" in options, "sink_tokens" in options),
    "alibi": lambda options: options["alibi"] is not Alibi.NONE,
    "scale": lambda options: options.get("softmax_scale", 1.0) > 0,
    "layout": lambda options: options["layout"] is Layout.ODD,
}


def grid_cases(dtypes: Iterable[DType]) -> list[Case]:
    """Every head dim with every mask: more than one tile of queries and of keys, none of them full."""
    return [
        Case(dtype=dtype, heads=4, heads_kv=2, seqlen_q=133, seqlen_k=201, head_dim=d, v_head_dim=d, **mask)
        for dtype in dtypes
        for d in range(8, 257, 8)
        for mask in MASKS
    ]


def pairwise_cases(dtypes: Iterable[DType]) -> list[Case]:
    """Every value of every feature axis with every value of every other one, the element type among them."""
    return [_case_of(row) for row in covering_rows(_axes(dtypes))]


def emulated_cases(dtypes: Iterable[DType], layouts: Iterable[Layout] = Layout) -> list[Case]:
    """The same pairs at fewer widths and in few kernels: a C++ compiler takes longer for one than the emulator for ten cases."""
    axes = _axes(dtypes) | {"width": EMULATED_WIDTHS, "layout": tuple({"layout": layout} for layout in layouts)}
    return [_case_of(row) for row in covering_rows_of_few_kinds(axes, _kernel_kind)]


def _axes(dtypes: Iterable[DType]) -> dict[str, tuple[_Options, ...]]:
    return {"dtype": tuple({"dtype": dtype} for dtype in dtypes), **FEATURE_AXES}


def _case_of(row: Mapping[str, _Options]) -> Case:
    return Case(**{key: value for options in row.values() for key, value in options.items()})


def _kernel_kind(axis: str, options: _Options) -> Hashable:
    return _KERNEL_KINDS.get(axis, bool)(options)


def grouped_cases(dtypes: Iterable[DType]) -> list[Case]:
    """2 to 64 query heads that share K and V, as many as one tile may hold, with every kind of mask and length, and with few queries."""
    shapes: tuple[_Options, ...] = (
        {"batch": 2, "seqlen_q": 75, "seqlen_k": 310, **CAUSAL},
        {"seqlen_q": 133, "seqlen_k": 201, "left": 40, "right": 0, "sink_tokens": 4},
        {"lengths_q": (65, 0, 1, 130, 8), "lengths_k": (65, 40, 200, 0, 3), "layout": Layout.PADDED, **CAUSAL},
        {"seqlen_q": 90, "seqlen_k": 40, "learned_sink": True, "layout": Layout.HEADS_FIRST, **CAUSAL},
    )
    few = tuple({"batch": 3, "seqlen_q": rows, "seqlen_k": 1000 + rows, **CAUSAL} for rows in (1, 17))
    return [
        Case(label="grouped_heads", dtype=dtype, heads=heads, heads_kv=heads_kv, head_dim=d, v_head_dim=dv, **shape)
        for dtype in dtypes
        for d, dv in ((64, 64), (128, 128), (192, 128), (256, 256))
        for heads, heads_kv in ((4, 2), (12, 3), (16, 2), (16, 1), (64, 1))
        for shape in (*shapes, *few)
    ]


def hazard_cases(dtypes: Iterable[DType]) -> list[Case]:
    """What usually goes wrong, each under its name, in each element type."""
    return [Case(label=label, dtype=dtype, **options) for dtype in dtypes for label, options in _hazards()]


def head_dim_cases(dtypes: Iterable[DType]) -> list[Case]:
    """Every head dim from 8 to 256 in steps of 8, and v widths on either side of it."""
    widths = [(d, d) for d in range(8, 257, 8)] + [(64, 128), (128, 64), (192, 128), (8, 256), (256, 8), (72, 56)]
    return [Case(dtype=dtype, head_dim=d, v_head_dim=dv, seqlen_q=70, seqlen_k=90, **CAUSAL) for dtype in dtypes for d, dv in widths]


def large_cases(dtypes: Iterable[DType]) -> list[Case]:
    """Sizes at which the oracle is evaluated on sampled rows."""
    shapes: tuple[_Options, ...] = (
        {"heads": 8, "heads_kv": 8, "seqlen_q": 4096, "seqlen_k": 4096, **CAUSAL},
        {"heads": 8, "heads_kv": 2, "seqlen_q": 2048, "seqlen_k": 5000, "head_dim": 128, "v_head_dim": 128},
        {"heads": 2, "heads_kv": 1, "seqlen_q": 9000, "seqlen_k": 9000, "left": 300, "right": 0, "sink_tokens": 4, "dropout_p": 0.1},
        {"heads": 4, "heads_kv": 4, "lengths_q": (3000, 1, 4000), "lengths_k": (3000, 5000, 4000), **CAUSAL},
    )
    return [Case(dtype=dtype, **shape) for dtype in dtypes for shape in shapes]


def _hazards() -> Iterator[tuple[str, _Options]]:
    yield from _hazards_of_length()
    yield from _hazards_of_masks()
    yield from _hazards_of_memory()
    yield from _hazards_of_numbers()


def _hazards_of_length() -> Iterator[tuple[str, _Options]]:
    yield "empty_batch", {"batch": 0}
    yield "no_queries", {"seqlen_q": 0}
    yield "no_keys", {"seqlen_k": 0}
    yield "no_keys_learned_sink", {"seqlen_k": 0, "learned_sink": True, "dropout_p": 0.2}
    yield "empty_sequence", {"lengths_q": (5, 0, 70), "lengths_k": (5, 0, 70), **CAUSAL}
    yield "empty_sequence_of_queries", {"lengths_q": (0, 33), "lengths_k": (65, 33), "alibi": Alibi.BATCH}
    yield "empty_sequence_of_keys", {"lengths_q": (33, 20, 4), "lengths_k": (65, 0, 0), "dropout_p": 0.3}
    yield "all_sequences_empty", {"lengths_q": (0, 0), "lengths_k": (0, 0)}
    yield "one_sequence_packed", {"lengths_q": (100,), "lengths_k": (120,), **CAUSAL}
    yield "many_short_sequences", {"lengths_q": tuple(i % 7 for i in range(60)), "lengths_k": tuple(i % 11 for i in range(60)), **CAUSAL}
    yield "one_token", {"seqlen_q": 1, "seqlen_k": 1}
    yield "one_token_causal_dropout", {"seqlen_q": 1, "seqlen_k": 1, "dropout_p": 0.5, "batch": 5, **CAUSAL}
    yield "one_query", {"seqlen_q": 1, "seqlen_k": 333, "heads": 8, "heads_kv": 2, **CAUSAL}
    yield "one_key", {"seqlen_q": 77, "seqlen_k": 1}
    for mask in ({}, CAUSAL, {"left": 10, "right": 3}):
        yield "more_queries_than_keys", {"seqlen_q": 150, "seqlen_k": 40, **mask}
    for length in (15, 17, 31, 33, 63, 65, 127, 128, 129, 191):
        yield "length_no_multiple_of_tile", {"seqlen_q": length, "seqlen_k": length, **CAUSAL}
        yield "length_no_multiple_of_tile", {"seqlen_q": 2, "seqlen_k": length}
    yield (
        "many_batches_and_heads",
        {"batch": 65, "heads": 12, "heads_kv": 4, "seqlen_q": 3, "seqlen_k": 5, "head_dim": 32, "v_head_dim": 32},
    )
    for heads, heads_kv in ((4, 4), (3, 1), (8, 1), (16, 2), (21, 7), (12, 4)):
        yield "gqa_ratio", {"heads": heads, "heads_kv": heads_kv, "seqlen_q": 50, "seqlen_k": 70, **CAUSAL}


def _hazards_of_masks() -> Iterator[tuple[str, _Options]]:
    yield "fully_masked_row", {"seqlen_q": 100, "seqlen_k": 60, **CAUSAL}
    yield "fully_masked_row_learned_sink", {"seqlen_q": 100, "seqlen_k": 60, "learned_sink": True, **CAUSAL}
    yield "fully_masked_row_dropout", {"seqlen_q": 300, "seqlen_k": 20, "left": 5, "right": 2, "dropout_p": 0.4}
    yield "fully_masked_tile", {"seqlen_q": 400, "seqlen_k": 3, **CAUSAL}
    yield "window_larger_than_sequence", {"left": 5000, "right": 5000, "seqlen_q": 90, "seqlen_k": 70}
    yield "window_larger_than_sequence", {"left": 2**31 - 1, "right": 0, "sink_tokens": 2}
    yield "window_of_one_key", {"left": 0, "right": 0, "seqlen_q": 130, "seqlen_k": 130}
    yield "window_across_tiles", {"left": 63, "right": 0, "seqlen_q": 260, "seqlen_k": 260}
    yield "window_across_tiles", {"left": 64, "right": 64, "seqlen_q": 260, "seqlen_k": 300}
    yield "window_right_of_diagonal", {"right": 37, "seqlen_q": 130, "seqlen_k": 190}
    yield "window_left_only", {"left": 37, "seqlen_q": 130, "seqlen_k": 190}
    for sinks in (1, 4, 64, 65, 150, 1000):
        yield "sink_tokens", {"left": 20, "right": 0, "sink_tokens": sinks, "seqlen_q": 200, "seqlen_k": 330}
    yield "sink_tokens_more_queries_than_keys", {"left": 3, "right": 0, "sink_tokens": 8, "seqlen_q": 90, "seqlen_k": 30}
    yield "sink_tokens_full_window", {"left": 10, "right": 10, "sink_tokens": 3, "lengths_q": (50, 0, 9), "lengths_k": (200, 7, 2)}
    yield "alibi_on_both_sides", {"seqlen_q": 90, "seqlen_k": 300, "alibi": Alibi.HEADS}
    yield "alibi_far", {"seqlen_q": 4, "seqlen_k": 3000, "alibi": Alibi.BATCH, "batch": 2, **CAUSAL}
    yield "dropout_most", {"dropout_p": 0.999, "seqlen_q": 100, "seqlen_k": 200}
    yield "dropout_least", {"dropout_p": 0.0001, "seqlen_q": 100, "seqlen_k": 200}
    yield "dropout_rows_and_columns_apart", {"dropout_p": 0.5, "seqlen_q": 150, "seqlen_k": 333, "heads": 6, "heads_kv": 2, "batch": 2}


def _hazards_of_memory() -> Iterator[tuple[str, _Options]]:
    for layout in Layout:
        yield "layout", {"layout": layout, "batch": 2, "seqlen_q": 70, "seqlen_k": 90, "heads": 4, "heads_kv": 2, **CAUSAL}
        yield "layout_packed", {"layout": layout, "lengths_q": (70, 9), "lengths_k": (90, 9), "heads": 4, "heads_kv": 2}
    yield "layout_odd_width", {"layout": Layout.ODD, "head_dim": 24, "v_head_dim": 40, "seqlen_q": 33, "seqlen_k": 65}
    yield "nan_in_masked_keys", {"values": Values.NAN_UNSEEN, "seqlen_q": 20, "seqlen_k": 150, "left": 9, "right": 0}
    yield "nan_in_masked_keys", {"values": Values.NAN_UNSEEN, "seqlen_q": 1, "seqlen_k": 100, "left": 30, "right": 30}
    yield (
        "nan_in_masked_keys_sinks",
        {"values": Values.NAN_UNSEEN, "seqlen_q": 20, "seqlen_k": 190, "left": 9, "right": 0, "sink_tokens": 5},
    )
    yield "nan_in_masked_keys_of_idle_sequence", {"values": Values.NAN_UNSEEN, "lengths_q": (0, 40, 0), "lengths_k": (30, 40, 30), **CAUSAL}
    yield (
        "nan_in_masked_keys_wide",
        {"values": Values.NAN_UNSEEN, "seqlen_q": 7, "seqlen_k": 300, "left": 40, "head_dim": 256, "v_head_dim": 256},
    )
    yield "nan_in_neighbour", {"values": Values.NAN_NEIGHBOUR, "lengths_q": (33, 33), "lengths_k": (33, 33)}
    yield "nan_in_neighbour", {"values": Values.NAN_NEIGHBOUR, "batch": 2, "seqlen_q": 33, "seqlen_k": 65}


def _hazards_of_numbers() -> Iterator[tuple[str, _Options]]:
    yield "huge_scores", {"values": Values.HUGE}
    yield "huge_scores", {"values": Values.HUGE, "seqlen_q": 100, "seqlen_k": 300, "learned_sink": True, **CAUSAL}
    yield "huge_scores_softcap", {"values": Values.HUGE, "softcap": 1.0}
    yield "huge_scores_negative_scale", {"values": Values.HUGE, "softmax_scale": -0.125, **CAUSAL}
    yield "equal_scores", {"values": Values.TIES, "seqlen_k": 300}
    yield "negative_scale", {"softmax_scale": -0.3, "seqlen_q": 100, "seqlen_k": 200}
    yield "negative_scale_alibi", {"softmax_scale": -0.3, "alibi": Alibi.HEADS, "left": 30, "right": 0}
    yield "negative_scale_softcap", {"softmax_scale": -1.0, "softcap": 2.0, **CAUSAL}
    yield "zero_scale", {"softmax_scale": 0.0, "seqlen_q": 100, "seqlen_k": 200, **CAUSAL}
    yield "zero_scale_alibi", {"softmax_scale": 0.0, "alibi": Alibi.BATCH, "batch": 2}
    yield "zero_scale_softcap", {"softmax_scale": 0.0, "softcap": 3.0}
    for scale in (1e-30, 1e-39, 1e-50):  # the last two are a denormal number and zero in float32
        yield "tiny_scale", {"softmax_scale": scale, "alibi": Alibi.HEADS}
    for cap in (1e4, 1e6, 1e9):
        yield "softcap_far_above_scores", {"softcap": cap, **CAUSAL}
    for cap in (0.1, 5.0, 50.0, 1e3, 1e30):  # below the scores, among them, above
        yield "rising_scores_softcap", {"values": Values.RISING, "softcap": cap, "seqlen_q": 150, "seqlen_k": 700, **CAUSAL}
        yield "rising_scores_softcap", {"values": Values.RISING, "softcap": cap, "seqlen_q": 130, "seqlen_k": 500, "left": 200, "right": 60}
    yield "rising_scores", {"values": Values.RISING, "seqlen_q": 150, "seqlen_k": 700, **CAUSAL}
    for cap, scale in ((1e3, 40.0), (2e3, 50.0)):  # large scores below a larger cap: a relative error of the tanh would show
        yield "equal_scores_softcap", {"values": Values.TIES, "softcap": cap, "softmax_scale": scale, "seqlen_k": 256}
    yield "softcap_before_the_first_key", {"softcap": 50.0, "seqlen_q": 300, "seqlen_k": 100, "left": 50, "right": 0}
    yield "learned_sink", {"learned_sink": True, "seqlen_q": 100, "seqlen_k": 200, "heads": 6, "heads_kv": 2}
