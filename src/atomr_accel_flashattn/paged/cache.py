"""PagedKvCache: K and V of many sequences in pages, which sequences may share until one of them writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final, NoReturn

import numpy as np

from ..arrays.new import can_write_at, detached, empty_like_framework, int32_like, write_at
from ..arrays.read import as_numpy, dtype_name_of, read_array
from ..arrays.torch_hooks import tell_written
from ..errors import ArrayTypeError, DTypeError, SequenceError, ShapeError
from ..fp8 import quantize
from ..limits import CPU_DTYPES, FP8_DTYPES, as_integer, not_built
from ..problem import ArrayInfo
from ..reference.cache import Slots
from ..requests.checks import refuse_gradients
from ..requests.options import Fp8Options
from ..runtime.overflow import check
from ..types import DType, KvLayout, ScaleUnit
from .blocks import BlockAllocator
from .numbers import check_fp8, count_of, counts_of, listed, sizes_of
from .request import PagedAttentionRequest

__all__ = ["PagedKvCache"]

_QUANTISED: Final = (DType.F16, DType.BF16, DType.F32)  # what an fp8 cache takes


class _Held:
    """The pages of one sequence, in order, and how many of its slots are in use."""

    __slots__ = ("blocks", "length")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.length = 0


class PagedKvCache:
    """Pages of K and V, and who holds which (PagedAttention, arXiv 2309.06180). For one thread at a time.

    A sequence is a number that :meth:`allocate` or :meth:`fork` gives and :meth:`free` takes back; numbers are not used again. Sequences
    of a fork share pages; the first that writes into a page that another one holds gets a copy of it. Every call does all that it was
    asked, or raises and changes nothing.

    Attributes:
        k: NHD (blocks, block_size, Hkv, D), HND (blocks, Hkv, block_size, D), uninitialised, in the library and on the device of ``like``.
        v: the same with Dv.
        k_descale: of a cache of fp8, float32 (blocks, block_size, Hkv) in either layout: the factor of a slot and KV head; else None.
        v_descale: the same of v.
        num_blocks, block_size, heads_kv, head_dim, v_head_dim, layout: as given.

    Args:
        num_blocks: pages.
        block_size: slots of a page, a token each; any number from 1 on.
        heads_kv: KV heads.
        head_dim: of K, at most 256.
        v_head_dim: of V, None is that of K.
        dtype: element type, None is that of ``like``. F8E4M3 and F8E5M2 are of NumPy and torch alone; :meth:`append` quantises by token.
        layout: order of dimensions.
        like: an array of the library and the device that the cache is to be of; None is NumPy.

    Raises:
        ShapeError, HeadDimError, DTypeError: a size or a type that no cache has.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        heads_kv: int,
        head_dim: int,
        *,
        v_head_dim: int | None = None,
        dtype: DType | None = None,
        layout: KvLayout = KvLayout.NHD,
        like: Any = None,
    ) -> None:
        num_blocks, block_size, heads_kv, head_dim, width = sizes_of(
            num_blocks=num_blocks,
            block_size=block_size,
            heads_kv=heads_kv,
            head_dim=head_dim,
            v_head_dim=head_dim if v_head_dim is None else v_head_dim,
        )
        model = read_array(np.empty(0, np.float32) if like is None else like, "like")
        kind = model.dtype if dtype is None and like is not None else dtype
        if kind not in CPU_DTYPES and kind not in FP8_DTYPES:
            given = f"with {'no like' if like is None else f'a like of type {model.dtype_name}'}"
            raise DTypeError(
                f"dtype: got {dtype!r} {given}; allowed are DType.F16, BF16, F32, F64, F8E4M3 and F8E5M2, or None for the type of like"
            )
        if kind in FP8_DTYPES:
            check_fp8(model, head_dim, width)
        if not isinstance(layout, KvLayout):
            raise ShapeError(f"layout: got {layout!r}; allowed are KvLayout.NHD and KvLayout.HND")
        self.num_blocks, self.block_size, self.heads_kv = num_blocks, block_size, heads_kv
        self.head_dim, self.v_head_dim, self.layout = head_dim, width, layout
        middle = (block_size, heads_kv) if layout is KvLayout.NHD else (heads_kv, block_size)
        self._arrays = tuple(empty_like_framework(model, (num_blocks, *middle, size), dtype_name_of(kind)) for size in (head_dim, width))
        self.k, self.v = (each.source for each in self._arrays)
        scales = 2 if kind in FP8_DTYPES else 0
        self._descales = tuple(empty_like_framework(model, (num_blocks, block_size, heads_kv), "float32") for _ in range(scales))
        self.k_descale: Any
        self.v_descale: Any
        self.k_descale, self.v_descale = (each.source for each in self._descales) if scales else (None, None)
        self._blocks = BlockAllocator(num_blocks)
        self._sequences: dict[int, _Held] = {}
        self._next = 0

    def __reduce__(self) -> NoReturn:
        raise ArrayTypeError(
            "PagedKvCache: got a request to copy or pickle it, and the copy would hand out the same pages; allowed is one cache for them; "
            "fork a sequence, or make another cache"
        )

    def __repr__(self) -> str:
        kind, device = self._arrays[0].dtype_name, self._arrays[0].device
        return (
            f"PagedKvCache({self.num_blocks} blocks of {self.block_size}, {self._blocks.free} free, {len(self._sequences)} sequences, "
            f"{self.layout.value}, {kind} on {device})"
        )

    @property
    def free_blocks(self) -> int:
        """Pages that no sequence holds."""
        return self._blocks.free

    @property
    def sequences(self) -> tuple[int, ...]:
        """Sequences that are not freed, in the order in which they were made."""
        return tuple(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence.

        Raises:
            SequenceError: it was freed, or is none.
        """
        return self._held(sequence).length

    def allocate(self, tokens: int = 0) -> int:
        """A new, empty sequence, with room for ``tokens``.

        Raises:
            OutOfBlocksError: there is no room; there is no new sequence.
        """
        held = _Held()
        held.blocks = self._blocks.take(self._pages(count_of(tokens, "tokens")))
        return self._add(held)

    def fork(self, sequence: int) -> int:
        """A new sequence with the tokens of another one, whose pages it shares. Room that was reserved stays with the other one.

        Raises:
            SequenceError: it was freed, or is none.
        """
        parent = self._held(sequence)
        held = _Held()
        held.length = parent.length
        held.blocks = parent.blocks[: self._pages(parent.length)]
        self._blocks.share(held.blocks)
        return self._add(held)

    def free(self, sequences: int | Sequence[int]) -> None:
        """Give up sequences. Pages that no other sequence holds are free.

        Raises:
            SequenceError: one was freed before, is none, or is named twice; none has been freed.
        """
        for number, held in self._all(sequences):
            self._blocks.give_back(held.blocks)
            del self._sequences[number]

    def truncate(self, sequence: int, length: int) -> None:
        """Keep the first ``length`` tokens, as after a speculation that was refused. Room behind them is given back.

        Raises:
            SequenceError: it was freed, or is none.
            ShapeError: more tokens than there are.
        """
        held = self._held(sequence)
        tokens = count_of(length, "length")
        if tokens > held.length:
            raise ShapeError(f"length: got {length} for a sequence of {held.length} tokens; allowed is at most that")
        kept = self._pages(tokens)
        self._blocks.give_back(held.blocks[kept:])
        held.blocks, held.length = held.blocks[:kept], tokens

    def reserve(self, sequences: int | Sequence[int], tokens: int | Sequence[int]) -> None:
        """Make room for ``tokens`` more in each sequence, in pages that it alone holds: then kernels may write where the table says.

        A partial page that another sequence holds, too, is copied.

        Raises:
            SequenceError: a sequence was freed, is none, or is named twice.
            OutOfBlocksError: there is no room for all; nothing has changed.
            FeatureNotBuiltError: a page has to be copied on a GPU, in a library other than torch and CuPy.
        """
        named = self._all(sequences)
        counts = counts_of(tokens, len(named))
        copied: dict[int, int] = {}  # a shared page: copies of it
        needed = 0
        for (_, held), count in zip(named, counts, strict=True):
            page = self._shared_page(held) if count else None
            if page is not None and copied.get(page, 0) < self._blocks.holders(page) - 1:
                copied[page] = copied.get(page, 0) + 1
            needed += max(self._pages(held.length + count) - len(held.blocks), 0)
        self._blocks.check(needed + sum(copied.values()))
        if copied:
            self._refuse_foreign("a shared page to be copied", ())
        for (_, held), count in zip(named, counts, strict=True):
            page = self._shared_page(held) if count else None
            if page is not None:
                self._copy(held, page)
            held.blocks += self._blocks.take(max(self._pages(held.length + count) - len(held.blocks), 0))

    def advance(self, sequences: int | Sequence[int], tokens: int | Sequence[int]) -> None:
        """Count ``tokens`` more in each sequence: those that a call has written into reserved room, as ``flash_attn_with_kvcache`` does.

        Raises:
            SequenceError: a sequence was freed, is none, or is named twice.
            ShapeError: more tokens than there is room for; nothing has changed.
        """
        named = self._all(sequences)
        counts = counts_of(tokens, len(named))
        for (number, held), count in zip(named, counts, strict=True):
            room = len(held.blocks) * self.block_size - held.length
            if count > room or (count and self._shared_page(held) is not None):
                raise ShapeError(f"tokens: got {count} for sequence {number}, which has room of its own for {room}; reserve it first")
        for (_, held), count in zip(named, counts, strict=True):
            held.length += count

    def append(self, sequences: int | Sequence[int], k: Any, v: Any, tokens: Sequence[int] | None = None) -> None:
        """Write new keys and values behind the last ones of each sequence; makes room, copies shared pages, and counts the tokens.

        Args:
            sequences: a sequence, or several.
            k: (B, n, Hkv, D), n tokens for each; packed (total, Hkv, D) with ``tokens``. Of the type and on the device of the cache; for
                one of fp8 of float16, bfloat16 or float32, which is quantised, each token and KV head with a descale of its own.
            v: the same with Dv.
            tokens: how many of the packed rows each sequence gets, in order.

        Raises:
            SequenceError: a sequence was freed, is none, or is named twice.
            OutOfBlocksError: there is no room for all; nothing has been written.
            ShapeError, DTypeError: arrays that do not fit the cache; nothing has been written.
            FeatureNotBuiltError: a cache on a GPU of a library other than torch and CuPy, k and v of another one, or torch tensors
                that want gradients.
        """
        named = self._all(sequences)
        infos = read_array(k, "k"), read_array(v, "v")
        rows = self._check_new(infos, len(named), tokens)
        self._refuse_foreign("new tokens to be written", infos)
        counts = [len(each) for each in rows]
        self.reserve([number for number, _ in named], counts)
        written = self._quantised(infos) if self._descales else infos
        if self._arrays[0].device.kind == "cpu":
            self._write(named, rows, written)
        else:
            places = [self._places(held, count) for (_, held), count in zip(named, counts, strict=True)]
            blocks, slots = (np.concatenate([place[axis] for place in places] or [[]]).astype(np.int64) for axis in (0, 1))
            for cache, info in zip(self._written, written, strict=True):
                write_at(cache, (blocks, slots), info, swapped=self.layout is KvLayout.HND and len(cache.shape) == 4)
        for cache in self._written:
            tell_written(cache.source)
        for (_, held), count in zip(named, counts, strict=True):
            held.length += count

    def block_table(self, sequences: int | Sequence[int], entries: int | None = None) -> Any:
        """int32 (B, entries): the pages of each sequence, reserved ones among them, and -1 behind them; in the library of the cache.

        ``entries``: its width, None is that of the longest.

        Raises:
            SequenceError: a sequence was freed, is none, or is named twice.
            ShapeError: fewer entries than a sequence has pages.
        """
        named = self._all(sequences)
        most = max((len(held.blocks) for _, held in named), default=0)
        width = most if entries is None else count_of(entries, "entries")
        if width < most:
            raise ShapeError(f"entries: got {width}, and a sequence has {most} pages; allowed is at least that")
        table = np.full((len(named), width), -1, np.int32)
        for row, (_, held) in zip(table, named, strict=True):
            row[: len(held.blocks)] = held.blocks
        return int32_like(table, self.k)

    def seq_lens(self, sequences: int | Sequence[int]) -> Any:
        """int32 (B,): the tokens of each sequence, in the library of the cache.

        Raises:
            SequenceError: a sequence was freed, is none, or is named twice.
        """
        return int32_like(np.array([held.length for _, held in self._all(sequences)], np.int32), self.k)

    def check(self) -> None:
        """Whether calls over KV caches on the GPU of this cache had room for all their tokens; :func:`~..runtime.overflow.check` says more.

        Raises:
            CacheOverflowError: names a sequence that did not fit, by its place in the batch of its call.
        """
        if self._arrays[0].device.kind != "cpu":
            check(self._arrays[0].device.index)

    def request(self, q: Any, sequences: int | Sequence[int], *, entries: int | None = None, **asked: Any) -> PagedAttentionRequest:
        """A PagedAttentionRequest of q (B, Sq, Hq, D) over these sequences, as they are now.

        Args:
            q: the queries.
            sequences: their numbers.
            entries: width of the block table, None is that of the longest; the calls of a StepPlan have one of equal width.
            asked: other arguments of the request. ``fp8`` gets the descales of the cache, and has none of its own.

        Raises:
            SequenceError: a sequence was freed, is none, or is named twice.
            ShapeError: fewer entries than a sequence has pages.
            ConstructionError: as PagedAttentionRequest.
        """
        table, lengths = self.block_table(sequences, entries), self.seq_lens(sequences)
        if self._descales:
            asked["fp8"] = self._with_descales(asked.get("fp8"))
        return PagedAttentionRequest(q, self.k, self.v, table, lengths, layout=self.layout, **asked)

    def _with_descales(self, fp8: Any) -> Fp8Options:
        """Options of a call, with the descales of this cache."""
        given = Fp8Options() if fp8 is None else fp8
        if not isinstance(given, Fp8Options):
            raise ArrayTypeError(f"fp8: got {type(fp8).__qualname__}; allowed is an Fp8Options, or None")
        if given.k_descale is not None or given.v_descale is not None:
            raise ShapeError("fp8: got a k_descale or a v_descale; allowed are those of the cache, which its request has already")
        return replace(given, k_descale=self.k_descale, v_descale=self.v_descale)

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _add(self, held: _Held) -> int:
        number = self._next
        self._next += 1
        self._sequences[number] = held
        return number

    def _held(self, sequence: Any) -> _Held:
        return self._find(sequence)[1]

    def _find(self, sequence: Any) -> tuple[int, _Held]:
        """Number and pages."""
        number = as_integer(sequence)
        if number is None:
            raise SequenceError(f"sequence: got {sequence!r}; allowed is an integer, or a list or an array of NumPy of some")
        held = self._sequences.get(number)
        if held is None:
            what = "which was freed" if 0 <= number < self._next else "which was never allocated"
            raise SequenceError(f"sequence: got {sequence!r}, {what}; allowed are the sequences of this cache that are not freed")
        return number, held

    def _all(self, sequences: int | Sequence[int]) -> list[tuple[int, _Held]]:
        """Numbers and pages; one number is a list of one."""
        alone = as_integer(sequences)
        numbers: Any = [alone] if alone is not None else listed(sequences)
        named = [self._find(number) for number in numbers]
        if len({number for number, _ in named}) < len(named):
            raise SequenceError(f"sequences: got {list(numbers)!r}, in which one stands twice; allowed is each once")
        return named

    def _shared_page(self, held: _Held) -> int | None:
        """The page that the next token goes to, where it holds tokens and another sequence has it, too."""
        if held.length % self.block_size == 0:
            return None
        page = held.blocks[held.length // self.block_size]
        return page if self._blocks.holders(page) > 1 else None

    def _copy(self, held: _Held, page: int) -> None:
        """Give a sequence a page of its own with what is in ``page``."""
        (own,) = self._blocks.take(1)
        for cache in self._written:
            blocks = as_numpy(cache) if cache.device.kind == "cpu" else detached(cache)
            blocks[own] = blocks[page]
            tell_written(cache.source)
        self._blocks.give_back([page])
        held.blocks[held.length // self.block_size] = own

    @property
    def _written(self) -> tuple[ArrayInfo, ...]:
        """All arrays that tokens are written to."""
        return (*self._arrays, *self._descales)

    def _quantised(self, infos: tuple[ArrayInfo, ArrayInfo]) -> tuple[ArrayInfo, ...]:
        """New tokens in fp8, k and v, and their descales."""
        made = []
        for info, cache in zip(infos, self._arrays, strict=True):
            rows = as_numpy(info) if info.device.kind == "cpu" else detached(info)
            rows = rows if len(info.shape) == 4 else rows[None]
            assert cache.dtype is not None  # noqa: S101 - it is an fp8 one
            made.append(quantize(rows, cache.dtype, unit=ScaleUnit.TOKEN))
        (k, k_descale), (v, v_descale) = made
        return tuple(read_array(each, "new tokens") for each in (k, v, k_descale, v_descale))

    def _pages_first(self, cache: ArrayInfo) -> Any:
        """A NumPy view (blocks, slots, KV heads, head dim), of descales (blocks, slots, KV heads)."""
        swapped = self.layout is KvLayout.HND and len(cache.shape) == 4
        return as_numpy(cache).swapaxes(1, 2) if swapped else as_numpy(cache)

    def _write(self, named: list[tuple[int, _Held]], rows: list[range], written: tuple[ArrayInfo, ...]) -> None:
        """New tokens, in host memory."""
        for cache, info in zip(self._written, written, strict=True):
            values = as_numpy(info).reshape(-1, *info.shape[2 - len(cache.shape) :])
            for (_, held), own in zip(named, rows, strict=True):
                slots = Slots(self._pages_first(cache), np.array(held.blocks, np.int64), held.length, (len(own), *values.shape[1:]))
                slots[0 : len(own)] = values[own.start : own.stop]

    def _places(self, held: _Held, count: int) -> tuple[Any, Any]:
        """Block and slot of the next tokens of a sequence."""
        at = np.arange(held.length, held.length + count)
        return np.array(held.blocks, np.int64)[at // self.block_size], at % self.block_size

    def _refuse_foreign(self, what: str, given: tuple[ArrayInfo, ...]) -> None:
        """On a GPU, pages are written with the library of the cache: torch or CuPy."""
        device = self._arrays[0].device
        if device.kind != "cpu" and not all(can_write_at(each, self._arrays[0]) for each in (self._arrays[0], *given)):
            raise not_built("append", f"got {what} on {device}")

    def _check_new(self, infos: tuple[ArrayInfo, ArrayInfo], batch: int, tokens: Sequence[int] | None) -> list[range]:
        """The rows of each sequence in k and v without their batch."""
        for name, info, width, cache in zip("kv", infos, (self.head_dim, self.v_head_dim), self._arrays, strict=True):
            refuse_gradients(info, name, on_cache=True)
            lead = (batch, infos[0].shape[1]) if tokens is None and len(infos[0].shape) == 4 else infos[0].shape[:1]
            if info.shape != (*lead, self.heads_kv, width) or (tokens is None) != (len(info.shape) == 4):
                form = f"({batch}, tokens, {self.heads_kv}, {width})" if tokens is None else f"(total, {self.heads_kv}, {width})"
                advice = "; give tokens=[...] beside packed rows" if tokens is None and len(info.shape) == 3 else ""
                raise ShapeError(f"{name}: got shape {info.shape}; allowed is {form}, equal tokens in k and v{advice}")
            allowed = _QUANTISED if self._descales else (cache.dtype,)
            if info.dtype not in allowed or info.device != cache.device:
                names = " or ".join(dtype_name_of(each) for each in allowed if each is not None)
                raise DTypeError(
                    f"{name}: got {info.dtype_name} on {info.device}; "
                    f"allowed is {names} on {cache.device}, {'to be quantised' if self._descales else 'as the cache'}; convert it"
                )
        if tokens is None:
            each = infos[0].shape[1]
            return [range(index * each, (index + 1) * each) for index in range(batch)]
        counts = counts_of(tokens, batch)
        if sum(counts) != infos[0].shape[0]:
            raise ShapeError(f"tokens: got {sum(counts)} of them for {infos[0].shape[0]} rows of k; allowed is a row for each")
        ends = np.cumsum([0, *counts]).tolist()
        return [range(start, end) for start, end in pairwise(ends)]
