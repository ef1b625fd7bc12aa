"""Between padded batches and packed sequences, as ``flash_attn.bert_padding`` (2.8) does it; torch, NumPy and CuPy arrays.

Indexing only, so torch's autograd goes through it. :func:`unpad_input` waits for the GPU, because the number of tokens is a value on it.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .arrays.read import read_array
from .errors import DeviceMismatchError, DTypeError, ShapeError
from .limits import is_integer
from .problem import ArrayInfo

__all__ = ["index_first_axis", "pad_input", "unpad_input"]


def index_first_axis(x: Any, indices: Any) -> Any:
    """Rows of ``x`` (n, ...) at ``indices`` (m,) integers: (m, ...).

    Raises:
        DTypeError: ``indices`` that are no integers.
        ShapeError: ``x`` without a second dimension, ``indices`` not flat, or, in host memory, one that is no row.
        DeviceMismatchError: they live on different devices.
    """
    rows = _check_rank(x, "x", 2, "(rows, ...)")
    _check_indices(rows, indices, rows.shape[0])
    return x[indices]


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
    for name, mask in (("attention_mask", attention_mask), ("unused_mask", unused_mask)):
        if mask is None and name == "unused_mask":
            continue
        info = read_array(mask, name)
        if info.shape != states.shape[:2]:
            raise ShapeError(f"{name}: got shape {info.shape}; allowed is {states.shape[:2]}, the batch and length of hidden_states")
        if info.device != states.device:
            raise DeviceMismatchError(f"{name}: got an array on {info.device} with hidden_states on {states.device}; allowed is one device")
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    int32 = sys.modules["torch"].int32 if _is_torch(kept) else np.int32
    lengths = kept.sum(-1, dtype=int32)
    cu_seqlens = _zeros(lengths, (states.shape[0] + 1,))
    cu_seqlens[1:] = lengths.cumsum(0)
    indices = _flat_nonzero(kept)
    flat = hidden_states.reshape((states.shape[0] * states.shape[1], *states.shape[2:]))
    longest = int(lengths.max()) if states.shape[0] else 0
    if int(cu_seqlens[-1]) != indices.shape[0]:
        raise ShapeError("attention_mask and unused_mask: got a value other than 0 and 1, or a token in both; allowed is 1 in at most one")
    return flat[indices], indices, cu_seqlens, longest, attention_mask.sum(-1, dtype=int32)


def pad_input(hidden_states: Any, indices: Any, batch: int, seqlen: int) -> Any:
    """Undo :func:`unpad_input`: rows (total, ...) to (batch, seqlen, ...), zero where there was no token.

    Raises:
        DTypeError: ``indices`` that are no integers.
        ShapeError: a negative size, as many indices as there are not rows, or, in host memory, one outside of batch * seqlen.
        DeviceMismatchError: arrays on different devices.
    """
    rows = _check_rank(hidden_states, "hidden_states", 1, "(total, ...)")
    for name, size in (("batch", batch), ("seqlen", seqlen)):
        if not is_integer(size) or size < 0:
            raise ShapeError(f"{name}: got {size!r}; allowed is an integer >= 0")
    picked = _check_indices(rows, indices, batch * seqlen)
    if picked != rows.shape[0]:
        raise ShapeError(f"indices: got {picked} of them for {rows.shape[0]} rows; allowed is one index for each row of hidden_states")
    padded = _zeros(hidden_states, (batch * seqlen, *rows.shape[1:]))
    padded[indices] = hidden_states
    return padded.reshape((batch, seqlen, *rows.shape[1:]))


def _is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _zeros(like: Any, shape: tuple[int, ...]) -> Any:
    if _is_torch(like):
        return like.new_zeros(shape)
    library = np if isinstance(like, np.ndarray) else sys.modules[type(like).__module__.partition(".")[0]]
    return library.zeros(shape, dtype=like.dtype)


def _flat_nonzero(mask: Any) -> Any:
    return mask.reshape(-1).nonzero().reshape(-1) if _is_torch(mask) else mask.reshape(-1).nonzero()[0]


def _check_rank(x: Any, name: str, rank: int, layout: str) -> ArrayInfo:
    info = read_array(x, name)
    if len(info.shape) < rank:
        raise ShapeError(f"{name}: got shape {info.shape}; allowed is {layout}")
    return info


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
        least, most = int(indices.min()), int(indices.max())
        if least < 0 or most >= places:
            raise ShapeError(f"indices: got values from {least} to {most}; allowed are 0..{places - 1}, the places that there are")
    return info.shape[0]
