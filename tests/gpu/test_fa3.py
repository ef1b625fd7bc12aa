"""Hazards of the FA3 family alone: persistent kernels and their counters, tensor maps, tile edges, many sequences and long ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.dispatch import DispatchKey, Extras, lookup  # noqa: E402 - after the skip
from atomr_accel_flashattn.fa3 import Fa3FwdRequest, PersistentMode  # noqa: E402
from atomr_accel_flashattn.functional import flash_attn_func  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec  # noqa: E402
from atomr_accel_flashattn.launch import counters  # noqa: E402
from atomr_accel_flashattn.launch.driver import check, driver  # noqa: E402
from atomr_accel_flashattn.requests.options import MaskKind  # noqa: E402
from atomr_accel_flashattn.runtime.execute import run  # noqa: E402
from atomr_accel_flashattn.types import DType, SmArch  # noqa: E402
from atomr_accel_flashattn.varlen import CumulativeSeqlens, VarlenFwdRequest  # noqa: E402
from tests.cases import Case  # noqa: E402
from tests.check import Run, check_arrays, check_case  # noqa: E402
from tests.gpu.families import DEVICE, HAS_WGMMA, pretend_multiprocessors, use_family  # noqa: E402
from tests.gpu.harness import download, run_inputs  # noqa: E402
from tests.inputs import Inputs  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(not HAS_WGMMA, reason="needs a GPU with wgmma")]

PER_THREAD = 2  # CU_STREAM_PER_THREAD
WIDTHS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (64, 256), (192, 192), (256, 256))
MODES = (PersistentMode.Grid(), *map(PersistentMode.Persistent, (None, 1, 7, 131, 1000)))


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> Iterator[Family]:
    """With as many blocks as the card has multiprocessors; tests that want few say so."""
    with use_family(Family.FA3, monkeypatch):
        yield Family.FA3


def arrays(*shape: int, seed: int = 0) -> list[Any]:
    """q, k and v, bf16 normal."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    return [torch.randn(*shape, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]


def bits(tensor: Any) -> bytes:
    return download(tensor).tobytes()


def persistent(seed: int, blocks: int = 5) -> tuple[Fa3FwdRequest, bytes]:
    """A request of 384 tiles that 5 blocks take from the counter, and the bits of its answer."""
    request = Fa3FwdRequest(*arrays(4, 700, 16, 64, seed=seed), mask=MaskKind.causal(), persistent=PersistentMode.Persistent(blocks))
    spec = lookup(request.dispatch_key())
    assert isinstance(spec, KernelSpec)
    assert (spec.family, spec.tile.persistent) == (Family.FA3, True)
    return request, bits(run(request).out)


@pytest.mark.parametrize("heads_kv", [8, 2])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("mask", [MaskKind.full(), MaskKind.causal(), MaskKind.sliding_causal(100)], ids=["full", "causal", "window"])
def test_bits_do_not_depend_on_the_run_or_on_how_tiles_are_handed_out(width: int, mask: MaskKind, heads_kv: int) -> None:
    (q, _, _), (_, k, v) = arrays(3, 1300, 8, width), arrays(3, 1300, heads_kv, width)
    expected = run(Fa3FwdRequest(q, k, v, mask=mask))
    torch.cuda.synchronize()
    for mode in MODES:
        for _ in range(30):
            again = run(Fa3FwdRequest(q, k, v, mask=mask, persistent=mode))
            assert torch.equal(again.out.view(torch.int16), expected.out.view(torch.int16)), mode
            assert torch.equal(again.lse.view(torch.int32), expected.lse.view(torch.int32)), mode


def replayable(request: Fa3FwdRequest, stream: Any, launches: int = 3) -> tuple[Any, list[Any]]:
    """A graph of some launches of one request, captured from ``stream``, and the outputs they write."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = [run(request).out for _ in range(launches)]
    return graph, outputs


def test_graphs_of_one_stream_replay_side_by_side_and_beside_launches() -> None:
    requests = [persistent(seed) for seed in range(3)]
    capture, streams = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(3)]
    graphs = [replayable(request, capture) for request, _ in requests[:2]]
    for _ in range(50):
        for (graph, outputs), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                for output in outputs:
                    output.fill_(float("nan"))
                graph.replay()
        with torch.cuda.stream(streams[2]):
            beside = [run(requests[2][0]).out for _ in range(3)]
        torch.cuda.synchronize()
        for (_, outputs), (_, expected) in zip(graphs, requests, strict=False):
            assert [bits(output) for output in outputs] == [expected] * len(outputs)
        assert [bits(output) for output in beside] == [requests[2][1]] * 3


def test_a_capture_may_be_the_first_to_need_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    request, expected = persistent(0)
    monkeypatch.setattr(counters, "_pools", {})
    graph, outputs = replayable(request, torch.cuda.Stream())
    monkeypatch.setattr(counters, "_PAIRS", 1)  # every further launch makes a new block, still captured
    monkeypatch.setattr(counters, "_pools", {})
    other, more = replayable(request, torch.cuda.Stream())
    for _ in range(3):
        graph.replay()
        other.replay()
    torch.cuda.synchronize()
    assert [bits(output) for output in (*outputs, *more)] == [expected] * 6


def in_threads(count: int, work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def test_threads_on_streams_of_their_own() -> None:
    requests = [persistent(seed) for seed in range(4)]
    q, k, v = arrays(4, 700, 16, 64, seed=9)
    planned = bits(flash_attn_func(q, k, v))

    def work(index: int) -> None:
        request, expected = requests[index]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                outputs = [run(request).out for _ in range(4)]
                plans = [flash_attn_func(q, k, v) for _ in range(4)]
                stream.synchronize()
                assert [bits(output) for output in outputs] == [expected] * 4
                assert [bits(output) for output in plans] == [planned] * 4

    in_threads(4, work)


def test_the_default_streams_of_threads_are_different_streams() -> None:
    requests = [persistent(seed) for seed in range(4)]

    def work(index: int) -> None:
        request, expected = requests[index]
        torch.cuda.set_device(0)
        for _ in range(20):
            outputs = [torch.empty_like(request.q) for _ in range(4)]
            torch.cuda.current_stream().synchronize()
            for output in outputs:
                run(replace(request, out=output), stream=PER_THREAD)
            check(driver().cuStreamSynchronize(PER_THREAD), "cuStreamSynchronize")
            assert [bits(output) for output in outputs] == [expected] * 4

    in_threads(4, work)


def test_streams_that_are_destroyed_while_they_work() -> None:
    """Their handles come back while their kernels run."""
    cuda, requests = driver(), [persistent(seed, blocks=40) for seed in range(2)]
    torch.cuda.synchronize()
    flag = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
    for _ in range(30):
        outputs = [torch.empty_like(request.q) for request, _ in requests * 4]
        torch.cuda.synchronize()
        for output, (request, _) in zip(outputs, requests * 4, strict=True):
            stream = check(cuda.cuStreamCreate(flag), "cuStreamCreate")
            run(replace(request, out=output), stream=int(stream))
            check(cuda.cuStreamDestroy(stream), "cuStreamDestroy")
        torch.cuda.synchronize()
        assert [bits(output) for output in outputs] == [expected for _, expected in requests * 4]


def edge_cases() -> Iterator[Case]:
    """Lengths around every multiple of a kernel's tile, of two packed heads too; widths, masks and types in turns."""
    for n, (d, dv) in enumerate(WIDTHS):
        extras = Extras(v_head_dim=None if d == dv else dv)
        spec = lookup(DispatchKey(SmArch.SM_90A, DType.BF16, d, extras=extras))
        assert isinstance(spec, KernelSpec)
        edges = list(itertools.product((1, 2), (-1, 0, 1)))
        keys = [spec.tile.block_n * times + off for times, off in edges]
        for i, ((times, off), seqlen_k) in enumerate(itertools.product(edges, [*keys, 1])):
            heads, packed = ((3, 1), (2, 2))[i // 2 % 2]
            seqlen_q = spec.tile.block_m * times // packed + off
            dtype = (DType.F16, DType.BF16)[(i + n) % 2]
            mask: dict[str, Any] = ({}, {"right": 0}, {"left": spec.tile.block_n, "right": 0})[i % 3]
            yield Case(dtype=dtype, heads=heads, heads_kv=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=d, v_head_dim=dv, **mask)


@pytest.mark.parametrize("case", [*edge_cases()] if HAS_WGMMA else [], ids=str)
def test_lengths_around_every_tile_edge(case: Case) -> None:
    check_case(case, run_inputs)


def padded_reference(q: Any, k: Any, v: Any, lengths: Any, *, causal: bool) -> Any:
    """Float32 attention of many short sequences at once, packed: (total, H, D)."""
    rows = torch.arange(int(lengths.max()), device=q.device)
    real = rows[None, :] < lengths[:, None]  # (B, S)
    padded = [torch.zeros(*real.shape, *x.shape[1:], device=x.device).masked_scatter(real[..., None, None], x.float()) for x in (q, k, v)]
    scores = torch.einsum("bihd,bjhd->bhij", padded[0], padded[1]) * q.shape[-1] ** -0.5
    hidden = ~real[:, None, None, :] | ((rows[None, :] > rows[:, None]) & causal)
    out = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), padded[2])
    return out[real]


@pytest.mark.parametrize("blocks", [3, None])
@pytest.mark.parametrize("causal", [False, True])
def test_4096_sequences_of_1_to_64_tokens(monkeypatch: pytest.MonkeyPatch, causal: bool, blocks: int | None) -> None:
    if blocks is not None:
        pretend_multiprocessors(blocks, monkeypatch)
    lengths = torch.randint(1, 65, (4096,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = arrays(int(lengths.sum()), 4, 64)
    mask = MaskKind.causal() if causal else MaskKind.full()
    request = VarlenFwdRequest(q, k, v, cu_seqlens_q=CumulativeSeqlens(offsets, 64), mask=mask)
    spec = lookup(request.dispatch_key())
    assert isinstance(spec, KernelSpec)
    assert spec.family is Family.FA3
    first = run(request)
    expected = padded_reference(q, k, v, lengths, causal=causal)
    worst = (first.out.float() - expected).abs().max().item()
    assert worst < 4e-2, f"error {worst}, where values are up to 5 and bf16 has 8 bits"
    for _ in range(10):
        assert torch.equal(run(request).out.view(torch.int16), first.out.view(torch.int16))


LONG = 1 << 17


def check_long_causal(q: Any, k: Any, v: Any, out: Any, lse: Any) -> None:
    """Some rows of one causal sequence: (S, H, D) each, the LSE (H, S)."""
    for end in (16, 4096, 100_000, len(q)):
        rows = slice(end - 16, end)
        picked = (download(x)[None] for x in (q[rows], k[:end], v[:end]))
        inputs = Inputs(DType.BF16, *picked, softmax_scale=q.shape[-1] ** -0.5, left=None, right=0)
        check_arrays(f"rows before {end}", inputs, Run(download(out[rows])[None], download(lse[:, rows])[None]))


@pytest.mark.parametrize("width", [64, 128])
def test_one_sequence_of_128k_tokens(width: int) -> None:
    q, k, v = arrays(1, LONG, 2, width)
    output = run(Fa3FwdRequest(q, k, v, mask=MaskKind.causal()))
    assert bool(output.out.isfinite().all())
    check_long_causal(q[0], k[0], v[0], output.out[0], output.lse[0])


def test_one_sequence_of_128k_tokens_among_1000_tiny_ones() -> None:
    """Nearly all tiles of the grid, which has room for the long one in every sequence, are empty."""
    lengths = torch.randint(1, 65, (1000,), generator=torch.Generator().manual_seed(0))
    start = int(lengths[:500].sum())
    both = torch.cat([lengths[:500], torch.tensor([LONG]), lengths[500:]]).to(DEVICE)
    offsets = torch.nn.functional.pad(both.cumsum(0), (1, 0)).int()
    q, k, v = arrays(int(both.sum()), 2, 64)
    output = run(VarlenFwdRequest(q, k, v, cu_seqlens_q=CumulativeSeqlens(offsets, LONG), mask=MaskKind.causal()))
    long = slice(start, start + LONG)
    check_long_causal(q[long], k[long], v[long], output.out[long], output.lse[:, long])
    tiny = torch.cat([torch.arange(start), torch.arange(start + LONG, len(q))]).to(DEVICE)
    expected = padded_reference(q[tiny], k[tiny], v[tiny], lengths.to(DEVICE), causal=True)
    worst = (output.out[tiny].float() - expected).abs().max().item()
    assert worst < 4e-2, f"error {worst}, where values are up to 5 and bf16 has 8 bits"


def test_heads_and_batches_that_share_memory() -> None:
    """A tensor map with a stride of zero reads the same memory again."""
    q, _, _ = arrays(2, 300, 4, 64)
    _, k, v = arrays(1, 300, 1, 64, seed=1)
    shared = run(Fa3FwdRequest(q, k.expand(2, -1, 4, -1), v.expand(2, -1, 4, -1), mask=MaskKind.causal()))
    copied = run(Fa3FwdRequest(q, *(x.expand(2, -1, 4, -1).contiguous() for x in (k, v)), mask=MaskKind.causal()))
    assert torch.equal(shared.out, copied.out)
    assert np.array_equal(download(shared.lse), download(copied.lse))
