"""The shapes of attention over a KV cache that are measured, and their arithmetic. The most important come first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..types import DType
from .cells import select_by_name, short_length

__all__ = ["DENSE", "ROWS", "CacheCell", "cache_cells", "select_cache_cells"]

ROWS, DENSE = "rows", "dense"
HEADS, HEADS_KV = 32, 8  # of a model with grouped queries; names of cells leave them out
BATCHES, LENGTHS = (1, 8, 32, 128), (4096, 32768)
PAGES, OTHER_PAGES = (16, 64, 128), (8, 256)
TOKENS = (1, 2, 4, 8, 16)  # of a request whose speculation is verified
LONG = 65536
CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCell:
    """One row of the benchmark: sequences of ``length`` keys, the last of which are those of their queries (causal).

    Attributes:
        group: what it stands for: ``decode``, ``tokens``, ``chunk``, ``prefill``, ``few``, ``slots``, ``append``.
        batch: sequences with keys.
        length: keys of each.
        queries: query tokens of each.
        heads: of q.
        heads_kv: of k and v.
        head_dim: of all.
        dtype: element type of k and v.
        q_dtype: that of q; None is that of k and v.
        layout: ``rows`` of a contiguous cache, ``page<slots>``, or ``dense``: plain k and v, no cache.
        empty: sequences without a key beside them.
        appends: whether the last key of each sequence comes with the call and is rotated, as q is; else all are in the cache.
        beside: the cell whose time this one's is put beside; empty for none.
        limit: what this cell's time over that one's may be, 0 for no limit; with ``by_rate``, that cell's TFLOP/s over this one's.
    """

    group: str
    batch: int
    length: int
    queries: int = 1
    heads: int = HEADS
    heads_kv: int = HEADS_KV
    head_dim: int = 128
    dtype: DType = DType.BF16
    q_dtype: DType | None = None
    layout: str = ROWS
    empty: int = 0
    appends: bool = False
    beside: str = ""
    limit: float = 0.0
    by_rate: bool = False

    @property
    def type_of_q(self) -> DType:
        """Element type of q."""
        return self.q_dtype or self.dtype

    @property
    def page(self) -> int:
        """Slots of a page; 0 without pages."""
        return int(self.layout.removeprefix("page")) if self.layout.startswith("page") else 0

    @property
    def sequences(self) -> int:
        """Sequences of the call."""
        return self.batch + self.empty

    @property
    def pages(self) -> int:
        """Pages of a sequence."""
        return -(-self.length // self.page) if self.page else 0

    @property
    def slots(self) -> int:
        """Keys of a sequence that there is memory for."""
        return self.pages * self.page or self.length

    @property
    def kv_bytes(self) -> int:
        """Bytes of k and v, each read once."""
        return 2 * self.batch * self.length * self.heads_kv * self.head_dim * self.dtype.itemsize

    @property
    def flops(self) -> float:
        """Floating-point operations of both products."""
        hidden = self.queries * (self.queries - 1) // 2
        return 4.0 * self.batch * self.heads * self.head_dim * (self.queries * self.length - hidden)

    def __str__(self) -> str:
        queries = f"_q{short_length(self.queries)}" if self.queries > 1 else ""
        heads = "" if (self.heads, self.heads_kv) == (HEADS, HEADS_KV) else f"_h{self.heads}x{self.heads_kv}"
        dim = "" if self.head_dim == 128 else f"_d{self.head_dim}"
        empty = f"_empty{self.empty}" if self.empty else ""
        kind = "" if self.dtype is DType.BF16 else f"_{self.dtype.value}"
        kind += "" if self.q_dtype is None else f"_q{self.q_dtype.value}"
        return f"{self.group}_{self.batch}x{short_length(self.length)}{queries}{heads}{dim}_{self.layout}{empty}{kind}"


def _paged(page: int) -> str:
    return f"page{page}"


def _decode(layouts: tuple[str, ...]) -> list[CacheCell]:
    return [
        CacheCell(group="decode", batch=batch, length=length, layout=layout)
        for length in LENGTHS
        for batch in BATCHES
        for layout in layouts
    ]


def _tokens(layout: str) -> list[CacheCell]:
    """A few tokens a request over a long cache: within a tenth of the time of one."""
    cells = []
    for length in (32768, 131072):
        for batch in (1, 8):
            one = CacheCell(group="tokens", batch=batch, length=length, layout=layout)
            cells += [one, *(replace(one, queries=n, beside=str(one), limit=1.1) for n in TOKENS[1:])]
    return cells


def _chunks(layout: str) -> list[CacheCell]:
    """A chunk of a long prompt: with few heads at 85 % of the rate with many."""
    many = CacheCell(group="chunk", batch=1, length=LONG + CHUNK, queries=CHUNK, heads=64, heads_kv=8, layout=layout)
    few = replace(many, heads=8, heads_kv=1, beside=str(many), limit=1 / 0.85, by_rate=True)
    return [many, few]


def _prefill() -> list[CacheCell]:
    """A prompt from pages at 90 % of the speed of plain arrays."""
    dense = CacheCell(group="prefill", batch=2, length=8192, queries=8192, heads=16, heads_kv=16, layout=DENSE)
    return [dense, *(replace(dense, layout=layout, beside=str(dense), limit=1 / 0.9) for layout in (_paged(16), _paged(64), ROWS))]


def _few() -> list[CacheCell]:
    """Some queries behind 4096 keys, without a cache: the cells of that kind of the forward benchmark."""
    return [CacheCell(group="few", batch=batch, length=4096, queries=n, layout=DENSE) for n, batch in ((16, 64), (128, 16))]


def _slots() -> list[CacheCell]:
    """1,023 slots of a server that are empty, beside one long request: within 5 % of the time of that alone."""
    cells = []
    for length in (LONG, 2 * LONG):
        alone = CacheCell(group="slots", batch=1, length=length, layout=_paged(64))
        cells += [alone, replace(alone, empty=1023, beside=str(alone), limit=1.05)]
    return cells


def _appends() -> list[CacheCell]:
    """A step of a model's layer: append, rotary and attention, beside attention alone."""
    return [
        CacheCell(group="append", batch=batch, length=4096, layout=layout, appends=True, beside=f"decode_{batch}x4k_{layout}")
        for batch in (1, 8, 32)
        for layout in (ROWS, _paged(16))
    ]


def fp8_cache_cells() -> list[CacheCell]:
    """Decoding over a cache of fp8, beside the same over one of bf16: at 32 x 32k 1.5 times as fast with q in bf16, 1.8 times in fp8."""
    cells = []
    for layout in (ROWS, _paged(64)):
        for batch, length in ((1, 4096), (8, 32768), (32, 32768)):
            wide = CacheCell(group="decode", batch=batch, length=length, layout=layout)
            large = (batch, length) == (32, 32768)
            for q_dtype, gain in ((DType.BF16, 1.5), (None, 1.8)):
                limit = 1 / gain if large else 0.0
                cells.append(replace(wide, group="fp8", dtype=DType.F8E4M3, q_dtype=q_dtype, beside=str(wide), limit=limit))
    return cells


def cache_cells() -> list[CacheCell]:
    """Every cell of types that all GPUs take."""
    return [
        *_decode((ROWS, *map(_paged, PAGES))),
        *_few(),
        *_tokens(ROWS),
        *_chunks(_paged(64)),
        *_prefill(),
        *_slots(),
        *_appends(),
        *_decode(tuple(map(_paged, OTHER_PAGES))),
        *_tokens(_paged(16)),
        *_chunks(ROWS),
    ]


def select_cache_cells(patterns: str | None) -> list[CacheCell]:
    """Those whose name matches one of the comma-separated patterns (:func:`~.cells.select`); None is every cell but those of fp8."""
    return select_by_name(patterns, [*cache_cells(), *fp8_cache_cells()] if patterns else cache_cells())
