"""The benchmark over a KV cache on the CPU: every kind of cell in a tiny form, its check, and peers that fail."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench import cache_peers as peers_module, decode, probe  # noqa: E402
from atomr_accel_flashattn.bench.cache_cells import CacheCell, cache_cells, select_cache_cells  # noqa: E402
from atomr_accel_flashattn.bench.cache_inputs import CacheInputs, check_cache_rows, make_cache_inputs  # noqa: E402
from atomr_accel_flashattn.bench.cache_peers import Fa3Cache, Fa4Cache, FlashInfer, OurCalls, Xqa, _pages_in_use, cache_peers  # noqa: E402
from atomr_accel_flashattn.bench.cache_requests import cache_request  # noqa: E402
from atomr_accel_flashattn.bench.decode_report import decode_summary  # noqa: E402
from atomr_accel_flashattn.bench.inputs import ERROR_LIMIT  # noqa: E402
from atomr_accel_flashattn.bench.measure import Options  # noqa: E402
from atomr_accel_flashattn.bench.peers import Refused  # noqa: E402
from atomr_accel_flashattn.bench.read_ceiling import ReadSpec  # noqa: E402
from atomr_accel_flashattn.jit.compile import compile_kernel  # noqa: E402
from atomr_accel_flashattn.types import DType, SmArch  # noqa: E402

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
GROUPS = ("decode", "few", "tokens", "chunk", "prefill", "slots", "append")


def tiny(cell: CacheCell) -> CacheCell:
    """The cell with a hundred keys or so."""
    length = 65 if cell.group == "append" else 100
    queries = min(cell.queries, 5)
    return replace(
        cell, batch=min(cell.batch, 2), length=length, queries=queries, empty=min(cell.empty, 3), heads=8, heads_kv=2, head_dim=32
    )


TINY = list(dict.fromkeys(replace(tiny(cell), beside="", limit=0.0) for cell in cache_cells()))


def sets_of(cell: CacheCell) -> list[CacheInputs]:
    return make_cache_inputs(cell, CPU, reuse_bytes=2 * cell.kv_bytes)


def test_every_cell_that_is_asked_for_is_there_and_the_first_are_decodes_by_page() -> None:
    names = [str(cell) for cell in cache_cells()]
    assert len(set(names)) == len(names)
    assert names[:4] == ["decode_1x4k_rows", "decode_1x4k_page16", "decode_1x4k_page64", "decode_1x4k_page128"]
    grid = {
        f"decode_{b}x{s}_{layout}"
        for b in (1, 8, 32, 128)
        for s in ("4k", "32k")
        for layout in ("rows", *(f"page{p}" for p in (8, 16, 64, 128, 256)))
    }
    assert grid <= set(names)
    assert {f"tokens_{b}x{s}{q}_rows" for b in (1, 8) for s in ("32k", "128k") for q in ("", "_q2", "_q4", "_q8", "_q16")} <= set(names)
    assert {
        "chunk_1x66048_q512_h8x1_page64",
        "slots_1x64k_page64_empty1023",
        "few_64x4k_q16_dense",
        "prefill_2x8k_q8k_h16x16_page16",
    } <= set(names)
    assert {cell.beside for cell in cache_cells()} - {""} <= set(names)
    pairs = [[f"slots_1x{length}_page64", f"slots_1x{length}_page64_empty1023"] for length in ("64k", "128k")]
    assert [str(cell) for cell in select_cache_cells("slots")] == [*pairs[0], *pairs[1]]
    with pytest.raises(ValueError, match="no benchmark cell matches 'no such'"):
        select_cache_cells("no such")


def test_the_arithmetic_of_a_cell() -> None:
    cell = CacheCell(group="x", batch=3, length=10, queries=4, heads=8, heads_kv=2, head_dim=32, layout="page4")
    assert (cell.kv_bytes, cell.pages, cell.slots) == (2 * 3 * 10 * 2 * 32 * 2, 3, 12)
    assert cell.flops == 4 * 3 * 8 * 32 * (7 + 8 + 9 + 10)


def test_so_many_sets_that_no_cache_holds_what_is_read_between_two_uses() -> None:
    cell = TINY[0]
    assert len(make_cache_inputs(cell, CPU, reuse_bytes=5 * cell.kv_bytes - 1)) == 5
    assert len(make_cache_inputs(cell, CPU, reuse_bytes=cell.kv_bytes // 2)) == 1
    first, second = sets_of(cell)
    assert not torch.equal(first.k, second.k)


@pytest.mark.parametrize("cell", TINY, ids=str)
def test_our_calls_do_what_the_cell_says_and_the_check_sees_what_they_do_not(cell: CacheCell) -> None:
    sets = sets_of(cell)
    answer = OurCalls().prepare(cell, sets)[0]()
    assert check_cache_rows(cell, sets[0], answer) < 5e-3
    limit = 2 * ERROR_LIMIT[cell.dtype]
    assert check_cache_rows(cell, sets[0], answer.flip(2)) > limit
    assert check_cache_rows(cell, sets[0], torch.full_like(answer, float("nan"))) == float("inf")
    fewer = replace(sets[0], lengths=(sets[0].lengths - 9).clamp(min=0))
    assert (
        check_cache_rows(cell, sets[0], OurCalls().prepare(replace(cell, layout="rows") if cell.layout == "dense" else cell, [fewer])[0]())
        > limit
    )


def test_the_check_sees_a_wrong_page_a_missing_rotation_and_rows_of_empty_slots() -> None:
    paged = next(cell for cell in TINY if cell.page == 16)
    sets = sets_of(paged)
    assert sets[0].table is not None
    swapped = replace(sets[0], table=sets[0].table.flip(1).contiguous())
    assert check_cache_rows(paged, sets[0], OurCalls().prepare(paged, [swapped])[0]()) > 0.1
    appends = next(cell for cell in TINY if cell.appends)
    (inputs, _) = sets_of(appends)
    assert inputs.cos is not None
    straight = replace(inputs, cos=torch.ones_like(inputs.cos), sin=torch.zeros_like(inputs.cos))
    assert check_cache_rows(appends, inputs, OurCalls().prepare(appends, [straight])[0]()) > 0.04
    slots = next(cell for cell in TINY if cell.empty)
    sets = sets_of(slots)
    answer = OurCalls().prepare(slots, sets)[0]()
    answer[(sets[0].lengths == 0).nonzero()[0]] = 1.0
    assert check_cache_rows(slots, sets[0], answer) == float("inf")


class Broken(OurCalls):
    """A peer whose preparation fails as other libraries' do."""

    name = "fi"

    def prepare(self, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Any]:  # noqa: ARG002 - as its base
        raise AssertionError(f"unsupported {cell.group}\nand more")


class Wrong(OurCalls):
    """A peer with zeros."""

    name = "fa3"

    def prepare(self, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Any]:  # noqa: ARG002 - as its base
        return [lambda: torch.zeros_like(sets[0].q) for _ in sets]


class WrongOurs(Wrong):
    name = "ours"


class Twin(OurCalls):
    name = "xqa"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[CacheCell]:
    """One tiny cell of each group, and those that stand beside another of them."""
    chosen = {cell.group: tiny(cell) for cell in cache_cells()}
    base = replace(chosen["slots"], empty=0, beside="", limit=0.0)
    cells = [base, *(replace(cell, beside=str(base) if cell.group == "slots" else "") for cell in chosen.values())]
    monkeypatch.setattr(decode, "select_cache_cells", lambda _patterns: cells)
    monkeypatch.setattr(probe, "PROBE_SECONDS", 300.0)  # cores may be busy
    monkeypatch.setattr(probe, "START_SECONDS", 300.0)
    return cells


def run(tmp_path: Path, lines: list[str] | None = None, **options: Any) -> tuple[decode.DecodeReport, dict[str, Any], Path]:
    lines = [] if lines is None else lines
    report, path = decode.main_decode(
        Options(rounds=2, **options),
        out=tmp_path,
        commit="abc",
        picture="matplotlib" in sys.modules,
        say=lines.append,
        device=CPU,
        reuse_bytes=1,
    )
    return report, json.loads(path.read_text()), path


def test_a_run_goes_from_inputs_to_lines_a_record_and_a_picture(
    small: list[CacheCell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(decode, "cache_peers", lambda _names: [OurCalls(), Broken(), Wrong(), Twin()])
    lines: list[str] = []
    report, record, path = run(tmp_path, lines)
    assert report.failures == []
    assert path.name.startswith("decode_cpu_")
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert [row["cell"] for row in record["rows"]] == [str(cell) for cell in small]
    assert {row["group"] for row in record["rows"]} == set(GROUPS)
    for row in record["rows"]:
        ours = row["results"]["ours"]
        assert row["kernel"] == "reference_cpu"
        assert len(ours["rounds"]) == 2
        assert ours["gbs"] == pytest.approx(row["kv_bytes"] / ours["ms"] * 1e-6)
        assert ours["tflops"] == pytest.approx(row["flops"] / ours["ms"] * 1e-9)
        assert row["results"]["fi"]["refused"] == f"AssertionError: unsupported {row['group']}"
        assert row["results"]["fa3"]["refused"].startswith("wrong: relative error 1")
        assert row["ratios"].keys() == {"xqa"}
    assert sum(line.startswith(tuple(map(str, small))) for line in lines) >= len(small)
    assert any("of the time of" in line and "limit 1.05" in line for line in lines)
    assert f"fi has no time in 2 of {len(small)} cells: AssertionError: unsupported slots" in lines


def test_a_run_that_is_cut_keeps_the_figures_of_the_cells_before(
    small: list[CacheCell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lines(list[str]):
        def append(self, line: str) -> None:
            if line.startswith(str(small[2])):
                raise KeyboardInterrupt
            super().append(line)

    monkeypatch.setattr(decode, "cache_peers", lambda _names: [OurCalls()])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Lines())
    (path,) = tmp_path.glob("decode_cpu_*.json")
    assert [row["cell"] for row in json.loads(path.read_text())["rows"]] == [str(cell) for cell in small[:2]]
    assert multiprocessing.active_children() == []


def test_cells_that_the_budget_does_not_reach_are_named(small: list[CacheCell], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "cache_peers", lambda _names: [OurCalls()])
    report, record, _ = run(tmp_path, budget=-1.0)
    assert report.skipped == record["skipped"] == [str(cell) for cell in small]


@pytest.mark.usefixtures("small")
def test_a_wrong_answer_of_ours_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "cache_peers", lambda _names: [WrongOurs()])
    report, _, _ = run(tmp_path)
    assert len(report.failures) == len(report.rows)


def test_what_stands_beside_another_cell_is_told_with_its_limit() -> None:
    def row(name: str, ms: float, **fields: Any) -> dict[str, Any]:
        cell = CacheCell(group=name, batch=1, length=64)
        shape = asdict(cell) | {"cell": name, "ratios": {"fa3": ms}} | fields
        return shape | {"results": {"ours": {"ms": ms, "tflops": 1 / ms, "refused": None}}}

    rows = [
        row("a", 1.0),
        row("b", 1.2, beside="a", limit=1.1),
        row("c", 2.0, beside="a", limit=2.5, by_rate=True),
        row("d", 0.9, beside="gone"),
    ]
    report = {"rows": rows, "geometric_means": {}, "ceilings": [], "skipped": [], "lost": [], "failures": []}
    assert list(decode_summary(report)) == [
        "below 0.95 of the best peer in 1 of 4 cells: d 0.900 of fa3",
        "b takes 1.200 of the time of a (limit 1.10: EXCEEDED)",
        "c has a rate 2.000 times lower than a (limit 2.50: kept)",
    ]


def test_peers_that_are_not_installed_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "find_spec", lambda _name: None)
    cell = TINY[0]
    for peer in cache_peers()[1:]:
        with pytest.raises(Refused, match="not installed: no module"):
            peer.prepare(cell, sets_of(cell))
    with pytest.raises(ValueError, match="no peer named fa9; there are ours, fa3, fa4, fi, fi_cc, xqa, cudnn_fe, and all"):
        cache_peers(("fa9",))
    assert [peer.name for peer in cache_peers(("xqa", "ours"))] == ["ours", "xqa"]


def install(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    package = ModuleType(name)
    vars(package).update(members)
    monkeypatch.setattr(peers_module, "_is_there", lambda asked: asked == name)
    monkeypatch.setattr(peers_module, "importlib", SimpleNamespace(import_module={name: package}.__getitem__))


def by_ours(cell: CacheCell, sets: Sequence[CacheInputs], n: int) -> Any:
    return OurCalls().prepare(cell, sets)[n]()


def test_flash_attention_3_is_told_lengths_pages_and_what_to_append(monkeypatch: pytest.MonkeyPatch) -> None:
    import atomr_accel_flashattn as fa

    def stand_in(q: Any, k_cache: Any, v_cache: Any, **options: Any) -> Any:
        assert options.pop("num_splits") == 0
        return fa.flash_attn_with_kvcache(q, k_cache, v_cache, block_table=options.pop("page_table", None), **options), "lse"

    install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=stand_in)
    for cell in TINY:
        sets = sets_of(cell)
        assert check_cache_rows(cell, sets[1], Fa3Cache().prepare(cell, sets)[1]()) < 5e-3


def test_flash_attention_4_takes_one_split_where_it_has_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def stand_in(*_arguments: Any, num_splits: int, **_options: Any) -> Any:
        seen.append(num_splits)
        assert num_splits == 1, "no splits"
        return "o", None

    install(monkeypatch, "flash_attn.cute.interface", flash_attn_varlen_func=stand_in, flash_attn_func=stand_in)
    cell = TINY[0]
    assert [call() for call in Fa4Cache().prepare(cell, sets_of(cell))] == ["o", "o"]
    assert seen == [0, 1, 1]


FP8_CELL = CacheCell(group="fp8", batch=2, length=200, dtype=DType.F8E4M3, q_dtype=DType.BF16, layout="page64")


def test_flash_infer_is_planned_with_the_pages_in_use() -> None:
    cell = next(cell for cell in TINY if cell.empty)
    inputs = sets_of(cell)[0]
    offsets, pages, last = _pages_in_use(cell, inputs)
    assert inputs.table is not None
    for b in range(cell.sequences):
        own = pages[offsets[b] : offsets[b + 1]]
        assert torch.equal(own, inputs.table[b, : len(own)])
        assert (len(own) - 1) * cell.page + int(last[b]) == int(inputs.lengths[b]) or not len(own)
    assert [name.dtype for name in (offsets, pages, last)] == [torch.int32] * 3


def test_flash_infer_calls_give_what_its_wrappers_return(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []

    class Wrapper:
        def __init__(self, workspace: Any, layout: str, **options: Any) -> None:
            assert (workspace.dtype, layout) == (torch.uint8, "NHD")
            self.options = options

        def plan(self, *arguments: Any, **options: Any) -> None:
            planned.append((arguments, self.options | options))

        def run(self, q: Any, cache: Any) -> Any:
            return q + cache[0].flatten()[0]

    monkeypatch.setattr(peers_module, "_WORKSPACE_BYTES", 64)
    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=Wrapper, BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    for cell in (each for each in TINY if each.page and not each.appends):
        sets = sets_of(cell)
        for x, call in zip(sets, FlashInfer().prepare(cell, sets), strict=True):
            assert torch.equal(call(), x.q + x.k.flatten()[0])
        assert ("causal" in planned[-1][1]) == (cell.queries > 1)
        assert planned[-1][0][-1] == cell.page
    assert planned[0][1] | {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16} == planned[0][1]
    FlashInfer().prepare(FP8_CELL, sets_of(FP8_CELL))
    assert planned[-1][1] | {"q_data_type": torch.bfloat16, "kv_data_type": torch.float8_e4m3fn} == planned[-1][1]
    for peer in (FlashInfer(), Xqa()):
        with pytest.raises(Refused, match="q in 16 bits"):
            peer.prepare(replace(FP8_CELL, q_dtype=None), [])
    with pytest.raises(Refused, match="pages only"):
        FlashInfer().prepare(TINY[0], sets_of(TINY[0]))


def test_xqa_writes_into_its_own_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Any, cache: Any, _workspace: Any, table: Any, lengths: Any, slots: int, *, out: Any, **options: Any) -> None:
        assert (lengths.dtype, slots, options["kv_layout"]) == (torch.uint32, cell.slots, "NHD")
        assert table is not None
        out.copy_(q + cache[1].flatten()[0])

    monkeypatch.setattr(peers_module, "_WORKSPACE_BYTES", 64)
    install(monkeypatch, "flashinfer", decode=SimpleNamespace(xqa_batch_decode_with_kv_cache=attend))
    cell = next(each for each in TINY if each.page == 16 and each.queries == 1)
    sets = sets_of(cell)
    for x, call in zip(sets, Xqa().prepare(cell, sets), strict=True):
        assert torch.equal(call(), x.q + x.v.flatten()[0])
    with pytest.raises(Refused, match="pages of 16, 32, 64 and 128"):
        Xqa().prepare(replace(cell, layout="page8"), sets)


def test_the_kernel_that_reads_compiles_and_keeps_its_loads_in_registers() -> None:
    made = compile_kernel(ReadSpec(arch=SmArch.SM_90A))
    assert made.spill_bytes == 0
    assert made.registers <= 64


@pytest.mark.parametrize("q_dtype", [None, DType.BF16])
def test_a_cache_of_fp8_is_answered_and_checked_as_it_is(q_dtype: DType | None) -> None:
    cell = replace(FP8_CELL, q_dtype=q_dtype)
    inputs = make_cache_inputs(cell, CPU, reuse_bytes=1)[0]
    out = fa.run(cache_request(cell, inputs)).out
    assert out.dtype is torch.bfloat16
    assert check_cache_rows(cell, inputs, out) < ERROR_LIMIT[cell.dtype]
