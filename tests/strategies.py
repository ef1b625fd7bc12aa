"""Random cases for hypothesis: any combination of the features at any small size. It shrinks towards the smallest plain call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from .cases import Alibi, Case, Values
from .inputs import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from atomr_accel_flashattn.types import DType

__all__ = ["random_cases", "random_shapes"]

_MAX_LENGTH = 160


@st.composite
def random_cases(draw: st.DrawFn, dtypes: Sequence[DType], max_length: int = _MAX_LENGTH) -> Case:
    """A case with lengths up to ``max_length`` and head dims up to 256."""
    heads_kv = draw(st.integers(1, 3))
    left, right = draw(st.tuples(_bounds(max_length), _bounds(max_length)))
    return Case(
        dtype=draw(st.sampled_from(list(dtypes))),
        **draw(_lengths(max_length)),
        heads=heads_kv * draw(st.integers(1, 5)),
        heads_kv=heads_kv,
        head_dim=8 * draw(st.integers(1, 32)),
        v_head_dim=8 * draw(st.integers(1, 32)),
        left=left,
        right=right,
        sink_tokens=0 if left is None else draw(st.integers(0, max_length)),
        learned_sink=draw(st.booleans()),
        alibi=draw(st.sampled_from(Alibi)),
        softcap=draw(st.sampled_from([0.0, 0.5, 20.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.9])),
        softmax_scale=draw(st.none() | st.sampled_from([0.0, -0.1, 0.02, 0.5])),
        layout=draw(st.sampled_from(Layout)),
        values=draw(st.sampled_from([Values.NORMAL, Values.NORMAL, Values.NAN_UNSEEN, Values.TIES])),
    )


@st.composite
def random_shapes(draw: st.DrawFn, kernel: Mapping[str, Any], max_length: int = 270) -> Case:
    """A call of one given kernel: any sizes, heads, bounds, strides and values, with exactly the features that ``kernel`` says.

    ``kernel`` has ``dtype``, ``head_dim`` and ``v_head_dim`` as they are, whether there is a ``left`` and a ``right`` bound, ``sinks``,
    ``learned_sink``, ``softcap``, ``dropout``, a scale that is ``negative``, packed sequences (``varlen``), what ``alibi`` there is, and
    whether the query heads that share K and V are ``grouped`` in numbers that divide 64.
    """
    heads_kv = draw(st.integers(1, 3))
    ratios = (2, 4, 8) if kernel["grouped"] else (1, 3)
    bound = st.integers(0, max_length)
    return Case(
        **{name: kernel[name] for name in ("dtype", "head_dim", "v_head_dim", "learned_sink", "alibi")},
        **draw(_packed_lengths(max_length) if kernel["varlen"] else _dense_lengths(max_length)),
        heads=heads_kv * draw(st.sampled_from(ratios)),
        heads_kv=heads_kv,
        left=draw(bound) if kernel["left"] else None,
        right=draw(bound) if kernel["right"] else None,
        sink_tokens=draw(st.integers(1, max_length)) if kernel["left"] and kernel["sinks"] else 0,
        softcap=draw(st.sampled_from([0.5, 20.0])) if kernel["softcap"] else 0.0,
        dropout_p=draw(st.sampled_from([0.1, 0.9])) if kernel["dropout"] else 0.0,
        softmax_scale=draw(st.sampled_from([0.0, -0.1, -0.5]) if kernel["negative"] else st.none() | st.sampled_from([0.02, 0.5])),
        layout=draw(st.sampled_from([layout for layout in Layout if layout is not Layout.ODD])),  # which is another kernel
        values=draw(st.sampled_from([Values.NORMAL, Values.NORMAL, Values.NAN_UNSEEN, Values.TIES])),
    )


def _bounds(max_length: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(0, max_length)


def _lengths(max_length: int) -> st.SearchStrategy[dict[str, Any]]:
    return _dense_lengths(max_length) | _packed_lengths(max_length)


def _dense_lengths(max_length: int) -> st.SearchStrategy[dict[str, Any]]:
    length = st.integers(0, max_length)
    return st.fixed_dictionaries({"batch": st.integers(0, 3), "seqlen_q": length, "seqlen_k": length})


def _packed_lengths(max_length: int) -> st.SearchStrategy[dict[str, Any]]:
    length = st.integers(0, max_length)
    pairs = st.lists(st.tuples(length, length), min_size=1, max_size=5)
    return pairs.map(lambda each: {"lengths_q": tuple(q for q, _ in each), "lengths_k": tuple(k for _, k in each)})
