"""``compile``: kernels ahead of time, for chosen archs and features, in parallel; ``--out`` makes a cache to ship."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import chain, combinations, product
from pathlib import Path
from typing import Annotated, Any

import typer

from ..dispatch import FEATURES, DispatchKey, arch_of_capability, lookup, with_features
from ..env import settings
from ..errors import CacheError, CompileError, DispatchError
from ..jit.cache import KernelCache
from ..jit.compile import CompiledKernel, compile_many
from ..kernels.fa3_fwd import WARPGROUP_ROWS
from ..kernels.kv_append import Fp8AppendSpec, KvAppendSpec
from ..kernels.kvcache import Fa2KvCacheSpec
from ..kernels.spec import Family, KernelSpec
from ..kernels.step import ScheduledKvCacheSpec, StepScheduleSpec
from ..kernels.used import read_kernels
from ..launch.driver import device_count, device_properties
from ..limits import BEFORE_FP8, FP8_DTYPES, HEAD_DIM_WIDTHS, NOT_BUILT
from ..tiles.saved import read_saved_tiles, save_tiles
from ..types import DType, SmArch
from .output import Json, console, print_json, print_rows, progress_bar, size_text, time_text

__all__ = ["GPU_ARCHS", "MASKS", "all_specs", "compile_ahead", "outcome_row", "specs_for"]

GPU_ARCHS = tuple(arch for arch in SmArch if arch is not SmArch.CPU)
_LEFT_BOUND = ("sliding_causal", "sliding_full", "left_window")  # the last: window_size=(n, -1)
MASKS = ("full", "causal", *_LEFT_BOUND)
_DTYPES = (DType.F16, DType.BF16)
_BACKWARD = ("backward", "deterministic")
_CACHED = ("paged", "kv_cache")
_FP8 = ("fp8_kv", "fp8_block_descales")
_COMBINABLE = (
    *("sink_tokens", "varlen", "gqa", "alibi", "softcap", "learned_sink", "dropout", "unaligned", "scale_first"),
    *_BACKWARD,
    *_CACHED,
    *_FP8,
)
_CACHE_ROWS = (16, 32, 64, 128)  # what :func:`~..tiles.tables.cache_rows` gives
_PADDED = -8  # a head dim just below a width: the kernel that tests columns
_SHOWN = 60


def _names(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Completion of an option that takes one of ``values``."""
    known = list(values)

    def complete(incomplete: str) -> list[str]:
        return [value for value in known if value.startswith(incomplete)]

    return complete


_ARCH_NAMES = (*(arch.value for arch in GPU_ARCHS), "all")
_DTYPE_NAMES = tuple(dtype.value for dtype in (*_DTYPES, *FP8_DTYPES))


def compile_ahead(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="sm_80, sm_90, ... or 'all'; default: the GPUs of this machine, else all.", autocompletion=_names(_ARCH_NAMES)),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="f16, bf16, e4m3, e5m2; default: the first two.", autocompletion=_names(_DTYPE_NAMES))
    ] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="Head dims, 8 to 256; default: 64 and 128.")] = None,
    mask: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(MASKS)}; default: full and causal.", autocompletion=_names(MASKS))
    ] = None,
    feature: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Each is compiled on and off, in all combinations: {', '.join(_COMBINABLE)}. With backward, paged and kv_cache all "
            "kernels of a call are: of a cache those that append to it, combine splits and cut the keys of a StepPlan.",
            autocompletion=_names(_COMBINABLE),
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All archs, types, widths, masks and combinations: many hours.")] = False,
    like: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="The kernels that a run used: the file that ATOMR_FLASHATTN_RECORD_KERNELS named for it."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder to make a cache in, for ATOMR_FLASHATTN_CACHE_DIR elsewhere.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Kernels at a time; default: one per core.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count the kernels, and name them where they are few (--json: all).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile kernels ahead of time into the cache. Needs no GPU. Status 1 when one does not compile."""
    narrowed = [name for name, given in (("--dtype", dtype), ("--head-dim", head_dim), ("--mask", mask), ("--feature", feature)) if given]
    if like is not None and (narrowed or arch or everything):
        beside = ", ".join([*narrowed, *(["--arch"] if arch else []), *(["--all"] if everything else [])])
        raise typer.BadParameter(f"got it beside {beside}; a record names its kernels whole, so leave those out", param_hint="--like")
    if everything and narrowed:
        raise typer.BadParameter(f"got it beside {', '.join(narrowed)}; it takes all of them; --arch may stay", param_hint="--all")
    if like is not None:
        used = read_kernels(like)
        if not used:
            raise CacheError(f"{like}: got a record without a kernel; record a run on a GPU, as the CPU backend launches none")
        specs = _launched(used)
    elif everything:
        specs = _count_all(_archs(arch or ["all"]), hidden=as_json)
    else:
        specs = _asked_for(arch, dtype, head_dim or (64, 128), mask or MASKS[:2], feature or ())
    if dry_run:
        _show_plan(specs, as_json=as_json)
        return
    cache = _cache_to_fill(out)
    what = f"compiling {len(specs):,} kernels"
    with progress_bar(what, hidden=as_json) as bar:
        task = bar.add_task(what, total=len(specs))
        results = compile_many(specs, jobs, lambda _spec, _result: bar.advance(task), cache)
    _take_tiles_along(out)
    failures = [result for result in results if isinstance(result, CompileError)]
    _report(specs, results, cache, as_json=as_json)
    if failures:
        raise failures[0]


def _asked_for(
    arch: list[str] | None, dtype: list[str] | None, head_dims: Iterable[int], masks: Iterable[str], features: Iterable[str]
) -> list[KernelSpec]:
    """The kernels of the options.

    Raises:
        typer.BadParameter: a value that no kernel is made for.
    """
    try:
        dtypes, archs = [_dtype(name) for name in dtype] if dtype else _DTYPES, _archs(arch)
        if arch is None and (set(dtypes) & set(FP8_DTYPES) or set(features) & set(_FP8)):  # nobody asked for those that have no fp8
            archs = [each for each in archs if each not in BEFORE_FP8] or archs
        return specs_for(archs, dtypes, head_dims, masks, features)
    except DispatchError as error:
        raise typer.BadParameter(str(error)) from error


def _count_all(archs: Sequence[SmArch], *, hidden: bool) -> list[KernelSpec]:
    """:func:`all_specs`, which takes a minute or more, with what it has found so far on standard error."""
    parts = len(archs) * len(_DTYPES) * 2 * len(HEAD_DIM_WIDTHS)
    with progress_bar("counting the kernels", hidden=hidden) as bar:
        task = bar.add_task("counting the kernels", total=parts)

        def found(count: int) -> None:
            bar.update(task, advance=1, description=f"counting the kernels: {count:,}")

        return all_specs(archs, found)


def _take_tiles_along(out: Path | None) -> None:
    """Tiles that were tuned on this machine name some of the kernels, so a cache to ship needs them too; other devices do not use them."""
    here = settings()
    if out is None or here.cache_dir is None or here.cache_disabled or here.tuned_tiles_disabled:
        return
    tiles = [entry for entry in read_saved_tiles(here.cache_dir) if entry.current]
    if tiles:
        save_tiles(tiles, out)


def _cache_to_fill(out: Path | None) -> KernelCache:
    """The folder that the kernels are compiled for. It is strict: kernels that cannot be kept were compiled for nothing.

    Raises:
        CacheError: no folder is named, or the environment forbids to write to the one that is.
    """
    here = settings()
    folder = out or here.cache_dir
    if out is None and (folder is None or here.cache_readonly or here.cache_disabled):
        why = (
            "this user has no home"
            if folder is None
            else f"ATOMR_FLASHATTN_{'CACHE_READONLY' if here.cache_readonly else 'DISABLE_CACHE'} is set"
        )
        raise CacheError(f"no cache to fill: {why}; name a folder with --out")
    assert folder is not None  # noqa: S101 - refused above
    return KernelCache(folder, strict=True)


def specs_for(
    archs: Iterable[SmArch], dtypes: Iterable[DType], head_dims: Iterable[int], masks: Iterable[str], features: Iterable[str]
) -> list[KernelSpec]:
    """The kernels for every arch x type x head dim x mask x subset of ``features``, and for short and long sequences; each once.

    Raises:
        DispatchError: a mask or feature that is none, or a kernel that is not built.
    """
    masks, features = list(masks), list(dict.fromkeys(features))
    for name, given, allowed in (("mask", masks, MASKS), ("feature", features, _COMBINABLE)):
        wrong = [value for value in given if value not in allowed]
        if wrong:
            raise DispatchError(f"{name}: got {', '.join(wrong)}; allowed are {', '.join(allowed)}")
    if "sink_tokens" in features and not set(masks) & set(_LEFT_BOUND):
        bounded = ", ".join(_LEFT_BOUND)
        raise DispatchError(f"feature: got sink_tokens with mask {', '.join(masks)}; allowed with {bounded}, whose left bound they lift")
    # FEATURES gives its own window to a sink without one; here a mask without a left bound simply has no kernel with sinks.
    chosen = [(mask, *subset) for mask in masks for subset in _subsets(features) if mask in _LEFT_BOUND or "sink_tokens" not in subset]
    keys = (
        with_features(_masked(DispatchKey(arch, dtype, head_dim), mask), [*subset, *few])
        for arch, dtype, head_dim, (mask, *subset) in product(list(archs), list(dtypes), list(head_dims), chosen)
        for few in (([],) if set(subset) & {*_BACKWARD, *_CACHED} else ([], ["short_q"]))
    )
    return _kernels(keys)


def all_specs(archs: Iterable[SmArch], found: Callable[[int], None] = lambda _count: None) -> list[KernelSpec]:
    """The full product on ``archs``: exact and padded head dims of every width, both types, every mask and combination, and small kernels.

    Those write dropout patterns and merge states. Over a cache, whose kernels come in many tiles, one feature at a time. What is not built
    (``NOT_BUILT``) is left out.
    ``found`` is called after each arch, type and head dim, with the number of kernels so far.
    """
    archs = list(archs)
    head_dims = [width + change for width in HEAD_DIM_WIDTHS for change in (0, _PADDED)]
    features = [name for name in _COMBINABLE if name not in {*NOT_BUILT, *_CACHED, *_FP8}]
    cached = [[kind, name] for kind in _CACHED for name in features if _makes_a_difference((kind, name))]
    specs: dict[KernelSpec, None] = {}
    for arch, dtype, head_dim in product(archs, _DTYPES, head_dims):
        for together in (features, *cached):
            masks = _LEFT_BOUND if together[-1:] == ["sink_tokens"] else MASKS
            specs.update(dict.fromkeys(specs_for([arch], [dtype], [head_dim], masks, together)))
        found(len(specs))
    patterns = (
        with_features(DispatchKey(arch, DType.F16, 64, varlen=varlen), ["dropout_mask"]) for arch in archs for varlen in (False, True)
    )
    merges = (
        with_features(DispatchKey(arch, dtype, 64), ["merge_states", *odd])
        for arch in archs
        for dtype in (*_DTYPES, DType.F32)
        for odd in ([], ["unaligned"])
    )
    return list(dict.fromkeys([*specs, *_kernels(patterns), *_kernels(merges)]))


def _masked(key: DispatchKey, mask: str) -> DispatchKey:
    return replace(key, sliding_window=(1023, -1)) if mask == "left_window" else with_features(key, [mask])


def _kernels(keys: Iterable[DispatchKey]) -> list[KernelSpec]:
    """The kernels that calls of these keys launch, each once."""
    specs: dict[KernelSpec, None] = {}
    for key in keys:
        answers = [spec for spec in map(lookup, _as_calls_ask(key)) if isinstance(spec, KernelSpec)]
        specs.update(dict.fromkeys(_launched(answers)))
        specs.update(dict.fromkeys(StepScheduleSpec.before(spec) for spec in answers if isinstance(spec, ScheduledKvCacheSpec)))
        specs.update(
            dict.fromkeys(append for spec in answers if isinstance(spec, Fa2KvCacheSpec) and not spec.plain_kv for append in _appends(spec))
        )
    return list(specs)


def _appends(spec: Fa2KvCacheSpec) -> Iterator[KvAppendSpec]:
    """What may write new tokens into the cache before ``spec`` reads it: with both kinds of rotation, and both types of cos and sin.

    Into an fp8 cache they come in fp8, or in 16 bits.
    """
    of_fp8: dict[str, Any] = {}
    types: tuple[DType, ...] = (spec.dtype,)
    if spec.k_type.is_fp8:
        of_fp8 = {"k_dtype": spec.k_type, "v_dtype": spec.v_type}
        yield Fp8AppendSpec(arch=spec.arch, dtype=DType.F8E4M3, paged=spec.paged, **of_fp8)
        of_fp8 |= {name: getattr(spec, name) for name in ("k_token_scales", "v_token_scales")}
        types = _DTYPES if spec.dtype.is_fp8 else types
    kind = Fp8AppendSpec if of_fp8 else KvAppendSpec
    for dtype, interleaved, wide in product(types, (False, True), (False, True)):
        yield kind(arch=spec.arch, dtype=dtype, paged=spec.paged, interleaved=interleaved, wide_rotary=wide, **of_fp8)


def _launched(answers: Iterable[KernelSpec]) -> list[KernelSpec]:
    """The kernels of calls that these answer, each once."""
    return list(dict.fromkeys(step for spec in dict.fromkeys(answers) for step in spec.steps()))


def _as_calls_ask(key: DispatchKey) -> Iterator[DispatchKey]:
    """A key in the forms that calls give it, which choose by lengths and strides.

    With few tiles a block each, or by wgmma the keys split; heads packed or not; over a cache tiles of so many rows, keys split or not,
    or cut by a StepPlan, and but for that the same of plain fp8 by mma.sync; a backward of grouped heads with blocks that share keys or
    not.
    """
    cached = key.paged or key.extras.kv_cache
    if cached or (key.v_dtype.is_fp8 and key.family is Family.FA2):
        for rows, cut in product(_CACHE_ROWS, ("", "split", "scheduled") if cached else ("", "split")):
            yield replace(key, extras=replace(key.extras, cache_rows=rows, split=cut == "split", scheduled=cut == "scheduled"))
        if cached:
            yield from _of_many_queries(key)
        return
    if key.extras.direction == "bwd" and key.gqa_ratio > 1:
        for split in (False, True):
            yield replace(key, extras=replace(key.extras, head_split=split))
        return
    wgmma, extras = key.family is Family.FA3, key.extras
    splits = (False, True) if wgmma and extras.direction == "fwd" and not (extras.dropout or key.v_dtype.is_fp8) else (False,)
    for split, persistent, pack_gqa in product(splits, (None, False) if wgmma else (None,), (True, False) if key.packs_heads else (True,)):
        yield replace(key, extras=replace(extras, split=split, persistent=persistent, pack_gqa=pack_gqa))


def _of_many_queries(key: DispatchKey) -> Iterator[DispatchKey]:
    """The forms of a key over a cache that the wgmma family answers, none where it does not: heads packed or not, keys split or not."""
    lengths: tuple[dict[str, Any], ...] = ({}, {"short_q": True}, {"short_q": True, "few_rows": True})
    for ratio, persistent, split, rows in product((1, WARPGROUP_ROWS), (None, False), (False, True), lengths):
        asked = replace(key.extras, family=Family.FA3, persistent=persistent, split=split, **rows)
        many = replace(key, gqa_ratio=ratio, extras=asked)
        if key.arch is SmArch.SM_90A and many.family is Family.FA3 and (ratio == 1 or many.packs_heads):
            yield many


def _subsets(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """All that make a difference.

    Deterministic is a backward by itself. Over a cache, of which there are two kinds, gqa changes nothing, and there are no gradients and
    no dropout; nor are there with fp8.
    """
    ordered = [name for name in FEATURES if name in set(names)]
    every = chain.from_iterable(combinations(ordered, size) for size in range(len(ordered) + 1))
    return filter(_makes_a_difference, every)


def _makes_a_difference(subset: tuple[str, ...]) -> bool:
    chosen = set(subset)
    backward, cached, fp8 = chosen & set(_BACKWARD), chosen & set(_CACHED), chosen & set(_FP8)
    if fp8 and (len(fp8) > 1 or backward or "dropout" in chosen):
        return False
    if cached:
        return len(cached) == 1 and not backward and not chosen & {"gqa", "dropout"}
    return len(backward) < 2


def _archs(names: list[str] | None) -> list[SmArch]:
    if names is None:
        here = [arch_of_capability(*device_properties(index).compute_capability) for index in range(device_count())]
        return list(dict.fromkeys(here)) or list(GPU_ARCHS)
    known = {arch.value: arch for arch in GPU_ARCHS}
    wrong = [name for name in names if name not in {*known, "all"}]
    if wrong:
        raise typer.BadParameter(f"arch: got {', '.join(wrong)}; allowed are {', '.join(known)} and all")
    return list(GPU_ARCHS) if "all" in names else [known[name] for name in names]


def _dtype(name: str) -> DType:
    try:
        return DType(name)
    except ValueError:
        raise DispatchError(f"dtype: got {name}; allowed are {', '.join(_DTYPE_NAMES)}") from None


def outcome_row(result: CompiledKernel | CompileError) -> dict[str, Any]:
    """What is told of one compiled kernel, as plain values."""
    if isinstance(result, CompileError):
        return {"kernel": getattr(result.spec, "kernel_name", str(result.spec)), "error": str(result)}
    return {
        "kernel": result.spec.kernel_name,
        "arch": result.spec.arch.value,
        "registers": result.registers,
        "shared_bytes": result.shared_bytes,
        "spill_bytes": result.spill_bytes,
        "cubin_bytes": len(result.cubin),
        "seconds": result.seconds,
        "compile_seconds": result.compile_seconds,
        "cache_hit": result.cache_hit,
    }


def _show_plan(specs: list[KernelSpec], *, as_json: bool) -> None:
    if as_json:
        print_json({"count": len(specs), "kernels": [{"kernel": spec.kernel_name, **asdict(spec)} for spec in specs]})
        return
    per_arch = Counter(spec.arch.value for spec in specs)
    typer.echo(f"{len(specs):,} kernels: {', '.join(f'{count:,} for {arch}' for arch, count in per_arch.items())}")
    if len(specs) > _SHOWN:
        typer.echo("--json names them")
        return
    for spec in specs:
        typer.echo(spec.kernel_name)


def _report(specs: list[KernelSpec], results: list[CompiledKernel | CompileError], cache: KernelCache, *, as_json: bool) -> None:
    rows = [outcome_row(result) for result in results]
    where = cache.directory
    if as_json:
        print_json({"directory": where, "kernels": rows})
        return
    made = [row for row in rows if "error" not in row]
    screen = console()
    if made and len(made) <= _SHOWN:
        cells = [
            (
                row["kernel"],
                row["arch"],
                str(row["registers"]),
                size_text(row["shared_bytes"]),
                f"{row['spill_bytes']} B" if row["spill_bytes"] else "-",
                size_text(row["cubin_bytes"]),
                time_text(row["seconds"]),
                "hit" if row["cache_hit"] else "miss",
            )
            for row in made
        ]
        numeric = ("registers", "shared", "spills", "cubin", "time")
        spare = ("arch", "cubin", "shared", "cache", "spills", "registers", "time")
        print_rows(screen, "", ("kernel", "arch", *numeric, "cache"), cells, numeric=numeric, spare=spare)
    hits = sum(row["cache_hit"] for row in made)
    total = size_text(sum(row["cubin_bytes"] for row in made))
    screen.print(
        f"{len(specs):,} kernels: {len(made) - hits:,} compiled, {hits:,} from the cache, {len(specs) - len(made):,} failed; "
        f"{total} in {where}",
        soft_wrap=True,
    )
