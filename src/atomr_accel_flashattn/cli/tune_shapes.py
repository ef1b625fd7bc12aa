"""The shapes of ``tune``: cells of the benchmark by name, or one that is given by its sizes."""

from __future__ import annotations

from typing import NamedTuple

import typer

from ..bench.cache_cells import DENSE, CacheCell, cache_cells
from ..bench.cells import TOKENS, Cell, all_cells, select_by_name

__all__ = ["Shape", "shapes_of"]


class Shape(NamedTuple):
    """What was given by hand; None and empty: not given."""

    head_dim: int
    v_head_dim: int | None
    heads: int
    heads_kv: int | None
    batch: int | None
    seqlen: tuple[int, ...]
    seqlen_k: int | None
    causal: bool
    window: str | None
    varlen: str | None
    alibi: bool


def shapes_of(patterns: str | None, shape: Shape) -> list[Cell | CacheCell]:
    """The cells that match ``patterns``, of the forward benchmark and of that over a KV cache, or those that ``shape`` describes.

    Raises:
        typer.BadParameter: nothing matches, both or neither are given, or the sizes contradict each other.
    """
    by_hand = shape.seqlen or shape.varlen
    if bool(patterns) == bool(by_hand):
        raise typer.BadParameter("which shape? Name cells of the benchmark with --cells, or give sizes with --seqlen or --varlen; not both")
    if patterns:
        try:
            return select_by_name(patterns, [*all_cells(), *(cell for cell in cache_cells() if cell.layout != DENSE)])
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    _refuse(shape)
    if shape.varlen:
        return [_cell(shape, _integers("--varlen", shape.varlen), packed=True)]
    return [_cell(shape, (length,) * (shape.batch or max(1, TOKENS // length)), packed=False) for length in shape.seqlen]


def _refuse(shape: Shape) -> None:
    heads_kv = shape.heads_kv or shape.heads
    both = (
        ("--seqlen", bool(shape.seqlen)),
        ("--batch", shape.batch is not None),
        ("--seqlen-k", shape.seqlen_k is not None),
    )
    beside = [name for name, given in both if shape.varlen and given]
    if beside:
        raise typer.BadParameter(f"{', '.join(beside)}: got it beside --varlen, whose lengths say it all; leave it out")
    if shape.window and shape.causal:
        raise typer.BadParameter("--causal: got it beside --window; allowed is one of them; a causal window is --window L,0")
    if shape.heads % heads_kv:
        raise typer.BadParameter(f"--heads-kv: got {heads_kv} with {shape.heads} heads; allowed are divisors of {shape.heads}")


def _cell(shape: Shape, lengths: tuple[int, ...], *, packed: bool) -> Cell:
    return Cell(
        group="tune",
        head_dim=shape.head_dim,
        v_head_dim=shape.v_head_dim,
        heads=shape.heads,
        heads_kv=shape.heads_kv or shape.heads,
        lengths=lengths,
        length_k=shape.seqlen_k,
        causal=shape.causal,
        band=_band(shape.window),
        alibi=shape.alibi,
        packed=packed,
    )


def _band(window: str | None) -> tuple[int, int] | None:
    if window is None:
        return None
    sides = _integers("--window", window, at_least=-1)
    if len(sides) != 2:
        raise typer.BadParameter(f"--window: got {window}; allowed are two integers, as 1023,0; -1 is unbounded")
    return sides[0], sides[1]


def _integers(name: str, text: str, *, at_least: int = 1) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < at_least:
        raise typer.BadParameter(f"{name}: got {text}; allowed are comma-separated integers of at least {at_least}")
    return values
