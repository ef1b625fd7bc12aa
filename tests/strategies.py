"""Random cases for hypothesis: any combination of the features at any small size. It shrinks towards the smallest plain call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from .cases import Alibi, Case, Values
from .inputs import Layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from atomr_accel_flashattn.types import DType

__all__ = ["random_cases"]

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


def _bounds(max_length: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(0, max_length)


def _lengths(max_length: int) -> st.SearchStrategy[dict[str, Any]]:
    length = st.integers(0, max_length)
    dense = st.fixed_dictionaries({"batch": st.integers(0, 3), "seqlen_q": length, "seqlen_k": length})
    pairs = st.lists(st.tuples(length, length), min_size=1, max_size=5)
    packed = pairs.map(lambda each: {"lengths_q": tuple(q for q, _ in each), "lengths_k": tuple(k for _, k in each)})
    return dense | packed
