"""Memory: more than 2^31 elements, strides beyond 32 bits, and no copy or matrix that a user does not see."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.fa2 import MaskKind  # noqa: E402
from atomr_accel_flashattn.runtime.execute import run  # noqa: E402
from atomr_accel_flashattn.runtime.plan import Output  # noqa: E402
from atomr_accel_flashattn.types import DType  # noqa: E402
from atomr_accel_flashattn.varlen import CumulativeSeqlens, VarlenFwdRequest  # noqa: E402
from tests.cases import Case, build  # noqa: E402
from tests.check import Run, check_arrays  # noqa: E402
from tests.gpu.harness import DEVICE, dense, download, make_request  # noqa: E402
from tests.inputs import Inputs, Layout  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch]

MANY = 2**31
WINDOW = 64


@pytest.fixture
def big_memory() -> Iterator[None]:
    """30 GB of GPU memory to itself: the processes of a run take turns."""
    if DEVICE == "cpu":
        pytest.skip("sizes for a GPU")
    with FileLock(Path(tempfile.gettempdir()) / "atomr-flashattn-big-memory.lock"):
        if torch.cuda.mem_get_info(DEVICE)[0] < 40 << 30:
            pytest.skip("needs 40 GB of free GPU memory")
        yield
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


needs_big_memory = pytest.mark.usefixtures("big_memory")


def normal(*shape: int) -> Any:
    """bf16 normal values, made a slice at a time: the generator's own temporaries stay small."""
    made = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    flat = made.view(-1)
    for start in range(0, flat.numel(), 1 << 28):
        flat[start : start + (1 << 28)].normal_()
    return made


def part(q: Any, k: Any, v: Any, left: int | None, right: int | None) -> Inputs:
    """A small dense call made of a piece of a large one: q (Sq, H, D), k and v (Sk, H, D), the queries aligned to the last key."""
    arrays = (download(x)[None] for x in (q, k, v))
    return Inputs(DType.BF16, *arrays, softmax_scale=q.shape[-1] ** -0.5, left=left, right=right)


def check_part(name: str, inputs: Inputs, out: Any, lse: Any) -> None:
    """``out`` (Sq, H, D) and ``lse`` (H, Sq) of that piece."""
    check_arrays(name, inputs, Run(download(out)[None], download(lse)[None]))


def finite_everywhere(output: Output) -> bool:
    flat = output.out.view(-1)
    return all(bool(flat[start : start + (1 << 28)].isfinite().all()) for start in range(0, flat.numel(), 1 << 28))


@needs_big_memory
def test_more_than_2_to_31_elements_by_batch_and_heads() -> None:
    batch, length, heads, width = 2100, 64, 128, 128
    assert batch * length * heads * width > MANY
    q, k, v = (normal(batch, length, heads, width) for _ in range(3))
    output = run(dense(q, k, v, mask=MaskKind.causal()))
    assert finite_everywhere(output)
    crossing = MANY // (length * heads * width)
    for b in (0, crossing - 1, crossing, batch - 1):
        check_part(f"sequence {b}", part(q[b], k[b], v[b], None, 0), output.out[b], output.lse[b])


@needs_big_memory
def test_more_than_2_to_31_elements_by_length() -> None:
    length, heads, width = 270_000, 64, 128
    assert length * heads * width > MANY
    q, k, v = (normal(1, length, heads, width) for _ in range(3))
    output = run(dense(q, k, v, mask=MaskKind.sliding_causal(WINDOW)))
    assert finite_everywhere(output)
    for row in (WINDOW, MANY // (heads * width), length - 16):
        rows, keys = slice(row, row + 16), slice(row - WINDOW, row + 16)
        inputs = part(q[0, rows], k[0, keys], v[0, keys], WINDOW - 1, 0)
        check_part(f"rows from {row}", inputs, output.out[0, rows], output.lse[0, :, rows])


@needs_big_memory
def test_more_than_2_to_31_elements_packed() -> None:
    lengths, heads, width = [100_000, 0, 70_000, 100_000], 64, 128
    total = sum(lengths)
    assert total * heads * width > MANY
    q, k, v = (normal(total, heads, width) for _ in range(3))
    offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=DEVICE)
    seqlens = CumulativeSeqlens(offsets, max(lengths))
    output = run(VarlenFwdRequest(q, k, v, cu_seqlens_q=seqlens, mask=MaskKind.sliding_causal(WINDOW)))
    assert finite_everywhere(output)
    rows, keys = slice(total - 16, total), slice(total - 16 - WINDOW, total)
    check_part("last rows", part(q[rows], k[keys], v[keys], WINDOW - 1, 0), output.out[rows], output.lse[:, rows])
    first = slice(170_000, 170_016)  # the beginning of the last sequence
    check_part("first rows", part(q[first], k[first], v[first], WINDOW - 1, 0), output.out[first], output.lse[:, first])


@needs_big_memory
def test_strides_beyond_32_bits() -> None:
    storage = normal(5 << 29)
    q, k, v = (storage.as_strided((2, 70, 2, 64), (MANY + 8, 136, 64, 1), 1024 * n) for n in range(3))
    output = run(dense(q, k, v))
    for b in range(2):
        check_part(f"sequence {b}", part(q[b], k[b], v[b], None, None), output.out[b], output.lse[b])


@pytest.mark.skipif(DEVICE == "cpu", reason="counts GPU memory")
@pytest.mark.parametrize("layout", list(Layout), ids=lambda layout: layout.value)
def test_no_copy_of_an_input_whatever_its_layout(layout: Layout) -> None:
    case = Case(dtype=DType.BF16, batch=2, heads=8, heads_kv=8, seqlen_q=512, seqlen_k=512, right=0, layout=layout)
    request = make_request(build(case))
    run(request)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = run(request)
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    results = sum(_rounded(x.numel() * x.element_size()) for x in (output.out, output.lse))
    assert grown <= results, f"{grown} bytes were allocated for {results} bytes of results"


@pytest.mark.skipif(DEVICE == "cpu", reason="counts GPU memory")
def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    peaks = []
    for length in (4096, 16384):
        q = normal(1, length, 8, 64)
        run(dense(q, q, q, mask=MaskKind.causal()))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(dense(q, q, q, mask=MaskKind.causal()))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 4.1 * peaks[0]


@pytest.mark.skipif(DEVICE == "cpu", reason="counts GPU memory")
def test_many_calls_do_not_leak() -> None:
    requests = [make_request(build(replace(Case(), seqlen_q=16 + n))) for n in range(3)]
    for request in requests:
        run(request)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for step in range(600):
        run(requests[step % 3])
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def _rounded(size: int) -> int:
    """torch's allocator hands out multiples of 512 bytes."""
    return math.ceil(size / 512) * 512
