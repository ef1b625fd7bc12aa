"""Between padded batches and packed sequences, as ``flash_attn.bert_padding`` (2.8) does it; torch, NumPy and CuPy arrays.

Indexing only, so torch's autograd goes through it. The two that unpad wait for the GPU, because the number of tokens is a value on it.
Indices are integers of any type and size: in torch's own indexing, uint8 ones would be a mask.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .arrays.read import read_array
from .errors import DeviceMismatchError, DTypeError, ShapeError
from .limits import is_integer
from .problem import ArrayInfo

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def index_first_axis(x: Any, indices: Any) -> Any:
    """Rows of ``x`` (n, ...) at ``indices`` (m,) integers: (m, ...).

    Raises:
        DTypeError: ``indices`` that are no integers.
        ShapeError: ``x`` without a second dimension, ``indices`` not flat, or, in host memory, one that is no row.
        DeviceMismatchError: they live on different devices.
    """
    rows = _check_rank(x, "x", 2, "(rows, ...)")
    _check_indices(rows, indices, rows.shape[0])
    return x[_positions(x, indices)]


def index_first_axis_residual(x: Any, indices: Any) -> tuple[Any, Any]:
    """:func:`index_first_axis`, and ``x`` itself for the residual branch. Both gradients add up in that of ``x``.

    Raises:
        The errors of :func:`index_first_axis`.
    """
    return index_first_axis(x, indices), x


def index_put_first_axis(values: Any, indices: Any, first_axis_dim: int) -> Any:
    """Undo :func:`index_first_axis`: (first_axis_dim, ...) with ``values`` (m, ...) in the rows at ``indices`` (m,), zero elsewhere.

    Raises:
        DTypeError: ``indices`` that are no integers.
        ShapeError: ``values`` without a second dimension, a size below zero, as many indices as there are not values, or, in host memory,
            one that is no row.
        DeviceMismatchError: they live on different devices.
    """
    rows = _check_rank(values, "values", 2, "(rows, ...)")
    _check_size("first_axis_dim", first_axis_dim)
    return _put(values, "values", rows, indices, first_axis_dim)


def unpad_input(hidden_states: Any, attention_mask: Any, unused_mask: Any = None) -> tuple[Any, Any, Any, int, Any]:
    """Pack the valid tokens of a padded batch.

    Args:
        hidden_states: (B, S, ...).
        attention_mask: (B, S), bool or integer, 1 is valid.
        unused_mask: (B, S), 1 is a token that is kept in the packed array though it is not valid (allocated, unused).

    Returns:
        rows (total, ...), indices (total,) into the flattened (B * S) rows, cu_seqlens int32 (B + 1,), the longest length as int, and
        the number of valid tokens of each sequence, int32 (B,).

    Raises:
        ArrayTypeError: no attention mask.
        ShapeError: sizes that do not fit together, or masks that add up to anything but 0 and 1.
        DeviceMismatchError: arrays on different devices.
    """
    states = _check_rank(hidden_states, "hidden_states", 2, "(batch, length, ...)")
    _check_mask(states, attention_mask, "attention_mask")
    if unused_mask is not None:
        _check_mask(states, unused_mask, "unused_mask")
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    int32 = _library(kept).int32
    lengths = kept.sum(-1, dtype=int32)
    cu_seqlens = _cumulative(lengths)
    indices = _flat_nonzero(kept)
    longest = int(lengths.max()) if states.shape[0] else 0
    if int(cu_seqlens[-1]) != indices.shape[0]:
        raise ShapeError("attention_mask and unused_mask: got a value other than 0 and 1, or a token in both; allowed is 1 in at most one")
    return _flat(hidden_states, states)[indices], indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=int32)


def unpad_input_for_concatenated_sequences(hidden_states: Any, attention_mask_in_length: Any) -> tuple[Any, Any, Any, int]:
    """Pack a batch whose rows hold several sequences each, one after the other from the start of the row.

    Args:
        hidden_states: (B, S, ...).
        attention_mask_in_length: (B, S) integers: the lengths of the sequences in a row, in their order, and zeros. ``[2, 3, 0, 0, 0, 0]``
            is a row of 6 tokens: a sequence of 2, one of 3, and one token of padding.

    Returns:
        rows (total, ...), indices (total,) into the flattened (B * S) rows, cu_seqlens int32 (sequences + 1,), the longest length as int.

    Raises:
        ArrayTypeError: no lengths.
        DTypeError: lengths that are no integers.
        ShapeError: sizes that do not fit together, a negative length, or a row whose lengths add up to more than S.
        DeviceMismatchError: arrays on different devices.
    """
    states = _check_rank(hidden_states, "hidden_states", 2, "(batch, length, ...)")
    name = "attention_mask_in_length"
    info = _check_mask(states, attention_mask_in_length, name)
    if "int" not in info.dtype_name:
        raise DTypeError(f"{name}: got type {info.dtype_name}; allowed are integers, the lengths of the sequences")
    table = attention_mask_in_length.long() if _is_torch(attention_mask_in_length) else attention_mask_in_length.astype(np.int64)
    used, seqlen = table.sum(-1), states.shape[1]
    if min(info.shape) and (int(table.min()) < 0 or int(table.max()) > seqlen or int(used.max()) > seqlen):
        raise ShapeError(f"{name}: got a negative length, or a row of more than {seqlen} tokens; allowed is what fits in a row")
    lengths = table.reshape(-1)[_flat_nonzero(table)]
    places = _library(table).arange(seqlen, **({"device": table.device} if _is_torch(table) else {}))
    indices = _flat_nonzero(places[None, :] < used[:, None])
    longest = int(lengths.max()) if lengths.shape[0] else 0
    return _flat(hidden_states, states)[indices], indices, _cumulative(lengths), longest


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """Undo :func:`unpad_input`: rows (total, ...) to (batch, seqlen, ...), zero where there was no token.

    Raises:
        DTypeError: ``indices`` that are no integers.
        ShapeError: a negative size, as many indices as there are not rows, or, in host memory, one outside of batch * seqlen.
        DeviceMismatchError: arrays on different devices.
    """
    rows = _check_rank(hidden_states, "hidden_states", 1, "(total, ...)")
    _check_size("batch", batch)
    _check_size("seqlen", seqlen)
    padded = _put(hidden_states, "hidden_states", rows, indices, batch * seqlen)
    return padded.reshape((batch, seqlen, *rows.shape[1:]))


def _put(values: Any, name: str, rows: ArrayInfo, indices: Any, places: int) -> Any:
    picked = _check_indices(rows, indices, places)
    if picked != rows.shape[0]:
        raise ShapeError(f"indices: got {picked} of them for {rows.shape[0]} rows; allowed is one index for each row of {name}")
    padded = _zeros(values, (places, *rows.shape[1:]))
    padded[_positions(values, indices)] = values
    return padded


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _library(of: Any) -> Any:
    """The module that an array comes from: torch, NumPy or CuPy."""
    return np if isinstance(of, np.ndarray) else sys.modules["torch" if _is_torch(of) else type(of).__module__.partition(".")[0]]


def _zeros(like: Any, shape: tuple[int, ...]) -> Any:
    return like.new_zeros(shape) if _is_torch(like) else _library(like).zeros(shape, dtype=like.dtype)


def _cumulative(lengths: Any) -> Any:
    """0 and the sums of the lengths up to each, int32 (n + 1,)."""
    ends = _zeros(lengths, (lengths.shape[0] + 1,))
    ends[1:] = lengths.cumsum(0)
    return ends.int() if _is_torch(ends) else ends.astype(np.int32)


def _positions(x: Any, indices: Any) -> Any:
    """``indices`` as the library of ``x`` takes positions: torch takes uint8 ones, its own and NumPy's, for a mask, and refuses 16 bits."""
    if not _is_torch(x):
        return np.asarray(indices) if isinstance(x, np.ndarray) else indices
    torch = sys.modules["torch"]
    return torch.as_tensor(np.array(indices, np.int64) if isinstance(indices, np.ndarray) else indices, dtype=torch.int64)


def _flat(hidden_states: Any, states: ArrayInfo) -> Any:
    return hidden_states.reshape((states.shape[0] * states.shape[1], *states.shape[2:]))


def _flat_nonzero(mask: Any) -> Any:
    return mask.reshape(-1).nonzero().reshape(-1) if _is_torch(mask) else mask.reshape(-1).nonzero()[0]


def _check_rank(x: Any, name: str, rank: int, layout: str) -> ArrayInfo:
    info = read_array(x, name)
    if len(info.shape) < rank:
        raise ShapeError(f"{name}: got shape {info.shape}; allowed is {layout}")
    return info


def _check_mask(states: ArrayInfo, mask: Any, name: str) -> ArrayInfo:
    info = read_array(mask, name)
    if info.shape != states.shape[:2]:
        raise ShapeError(f"{name}: got shape {info.shape}; allowed is {states.shape[:2]}, the batch and length of hidden_states")
    if info.device != states.device:
        raise DeviceMismatchError(f"{name}: got an array on {info.device} with hidden_states on {states.device}; allowed is one device")
    return info


def _check_size(name: str, size: int) -> None:
    if not is_integer(size) or size < 0:
        raise ShapeError(f"{name}: got {size!r}; allowed is an integer >= 0")


def _check_indices(rows: ArrayInfo, indices: Any, places: int) -> int:
    """Their number. Values are looked at in host memory only."""
    info = read_array(indices, "indices")
    if len(info.shape) != 1:
        raise ShapeError(f"indices: got shape {info.shape}; allowed is a flat array")
    if "int" not in info.dtype_name:
        raise DTypeError(f"indices: got type {info.dtype_name}; allowed are integers; call .long() or .astype('int64')")
    if info.device != rows.device:
        raise DeviceMismatchError(f"indices: got an array on {info.device} with rows on {rows.device}; allowed is one device")
    if info.device.kind == "cpu" and info.shape[0]:
        values = indices.long() if _is_torch(indices) else indices  # torch has no minimum of unsigned 16 to 64 bits
        least, most = int(values.min()), int(values.max())
        if least < 0 or most >= places:
            raise ShapeError(f"indices: got values from {least} to {most}; allowed are 0..{places - 1}, the places that there are")
    return info.shape[0]
