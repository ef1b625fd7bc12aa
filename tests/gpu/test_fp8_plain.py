"""Dense and packed fp8 K and V by mma.sync on the card: features, types, q of 16 bits, edges of tiles, splits, spare rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.runtime import execute  # noqa: E402
from atomr_accel_flashattn.types import DType, SmArch  # noqa: E402
from tests.cases import Case, Values  # noqa: E402
from tests.check import Run  # noqa: E402
from tests.fp8 import DTYPES, Quantised, check_fp8  # noqa: E402
from tests.fp8_cases import BLOCK_TYPES, FP8_FEATURES, FP8_KINDS, Fp8Types, fp8_call  # noqa: E402
from tests.gpu.families import DEVICE, HAS_FP8, HAS_WGMMA, use_family  # noqa: E402
from tests.gpu.fp8_calls import request_of  # noqa: E402
from tests.gpu.harness import Written, download, poison_workspaces, synchronize, upload  # noqa: E402
from tests.inputs import Layout, place  # noqa: E402

GPU = DEVICE != "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with fp8")]

WIDTHS = (64, 128, 256)
WIDE_Q = (
    Fp8Types(DType.BF16),
    Fp8Types(DType.F16, DType.F8E4M3, DType.F8E5M2, DType.F16, fa.ScaleUnit.BLOCK),
    Fp8Types(DType.BF16, DType.F8E5M2, DType.F8E5M2, DType.F32, fa.ScaleUnit.TENSOR),
)
KINDS = (*FP8_KINDS, BLOCK_TYPES, *WIDE_Q)
NAMES = tuple(FP8_FEATURES)
# Every feature with every width, each time with another kind; and what is left of the widths.
ROWS = [(name, width, KINDS[(n + w) % len(KINDS)]) for n, name in enumerate(NAMES) for w, width in enumerate(WIDTHS)]
ROWS += [("everything", width, KINDS[w]) for w, width in enumerate((16, 32, 96, 192))]


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch, record_property: Any) -> Iterator[Family]:
    """That of mma.sync, with workspaces full of NaN."""
    record_property("family", Family.FA2.value)
    poison_workspaces(monkeypatch, execute)
    with use_family(Family.FA2, monkeypatch):
        yield Family.FA2


def spec_of(request: Any) -> Any:
    """The kernel that answers."""
    spec: Any = fa.lookup(request.dispatch_key())
    assert not GPU or (spec.HEADER, spec.plain_kv) == ("fp8_kvcache", True)
    return spec


def check(call: Quantised, types: Fp8Types, *, tiles_for: SmArch | None = None) -> Any:
    """One run on the device, into an output of NaN, compared with the oracle. Returns the request."""
    out = Written.like(place(np.full(call.meant.out_shape, np.nan, DTYPES[types.out]), Layout.PADDED))
    request = request_of(call, types.out, out.view)
    spec_of(request)
    output = fa.run(request, tiles_for=tiles_for if GPU else None)
    synchronize()
    check_fp8(f"{types}", call, Run(out.alone(), download(output.lse)), types.out)
    return request


@pytest.mark.parametrize(("name", "width", "types"), ROWS, ids=str)
def test_feature(name: str, width: int, types: Fp8Types) -> None:
    widths = {} if "head_dim" in FP8_FEATURES[name] else {"head_dim": width, "v_head_dim": width}
    check(fp8_call(Case(label=name.replace(" ", "_"), **FP8_FEATURES[name], **widths), types), types)


@pytest.mark.parametrize("types", [BLOCK_TYPES, WIDE_Q[0]], ids=str)
@pytest.mark.parametrize("off_k", [-1, 0, 1])
@pytest.mark.parametrize("rows", [15, 17, 32, 33, 64, 65, 127, 129])
def test_lengths_around_every_tile_edge(rows: int, off_k: int, types: Fp8Types) -> None:
    check(fp8_call(Case(heads=1, heads_kv=1, seqlen_q=rows, seqlen_k=128 + off_k, right=0), types), types)


@pytest.mark.parametrize("types", [BLOCK_TYPES, WIDE_Q[1]], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("packed", [False, True])
def test_few_queries_split_their_keys(packed: bool, width: int, types: Fp8Types) -> None:
    lengths: dict[str, Any] = {"lengths_q": (7, 0, 16), "lengths_k": (4000, 30, 5)} if packed else {"seqlen_q": 16, "seqlen_k": 5001}
    case = Case(heads=8, heads_kv=2, head_dim=width, v_head_dim=width, right=0, learned_sink=True, **lengths)
    request = check(fp8_call(case, types), types)
    assert not GPU or spec_of(request).split


@pytest.mark.parametrize("types", [BLOCK_TYPES, WIDE_Q[0]], ids=str)
@pytest.mark.parametrize("longest", [40, 3000])
def test_rows_past_the_last_sequence(longest: int, types: Fp8Types) -> None:
    call = fp8_call(Case(lengths_q=(30, 0, 21), lengths_k=(longest, 4, 21), heads=4, heads_kv=2, right=0), types)
    longer = {name: np.concatenate([x, np.full((3000, *x.shape[1:]), np.nan, x.dtype)]) for name in "qkv" for x in [getattr(call, name)]}
    output = fa.run(request_of(replace(call, **longer), types.out))
    synchronize()
    out, lse, rows = download(output.out), download(output.lse), len(call.q)
    check_fp8("owned", call, Run(out[:rows], lse[:, :rows]), types.out)
    assert not out[rows:].any()
    assert np.isneginf(lse[:, rows:]).all()


@pytest.mark.parametrize("types", [Fp8Types(), WIDE_Q[0]], ids=str)
def test_no_keys_give_zeros(types: Fp8Types) -> None:
    output = fa.run(request_of(fp8_call(Case(seqlen_q=70, seqlen_k=0), replace(types, unit=None)), types.out))
    synchronize()
    assert not download(output.out).any()
    assert np.isneginf(download(output.lse)).all()


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("types", [Fp8Types(), WIDE_Q[0]], ids=str)
def test_maxima_that_rise_in_every_tile_clip_no_probability(width: int, types: Fp8Types) -> None:
    case = Case(seqlen_q=300, seqlen_k=4000, head_dim=width, v_head_dim=width, values=Values.RISING)
    check(fp8_call(case, types), types)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("types", [BLOCK_TYPES, *FP8_KINDS, WIDE_Q[0]], ids=str)
def test_tiles_of_architectures_with_99_kb(width: int, types: Fp8Types) -> None:
    """And products of 8 bits, which Hopper runs in f16."""
    case = Case(heads=4, heads_kv=2, seqlen_q=150, seqlen_k=400, head_dim=width, v_head_dim=width, right=0)
    check(fp8_call(case, types), types, tiles_for=SmArch.SM_89)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_bits_do_not_depend_on_the_run(width: int) -> None:
    case = Case(batch=3, seqlen_q=700, seqlen_k=1300, heads=8, heads_kv=2, head_dim=width, v_head_dim=width, right=0)
    request = request_of(fp8_call(case, WIDE_Q[0]), DType.BF16)
    expected = download(fa.run(request).out).tobytes()
    for _ in range(20):
        assert download(fa.run(request).out).tobytes() == expected


@pytest.mark.parametrize("keys", [4096, 131072])
@pytest.mark.parametrize("q_dtype", ["float8_e4m3fn", "bfloat16"])
def test_the_mean_of_many_values_is_kept(keys: int, q_dtype: str) -> None:
    """q = 0: o is the mean of v, summed in float32."""
    width = 128
    q = torch.zeros(1, 128, 2, width, device=DEVICE).to(getattr(torch, q_dtype))
    k = torch.zeros(1, keys, 2, width, device=DEVICE).to(torch.float8_e4m3fn)
    v = (1 + torch.randn(1, keys, 2, width, device=DEVICE) / 4).to(torch.float8_e4m3fn)
    out = fa.run(fa.DenseFwdRequest(q, k, v, fp8=fa.Fp8Options(out_dtype=DType.F32))).out
    mean = v.float().double().mean(dim=1, keepdim=True)
    assert ((out.double() - mean) / mean).abs().max().item() < 1e-3


@pytest.mark.parametrize("packed", [False, True])
def test_a_functional_call_is_its_request(packed: bool) -> None:
    more: dict[str, Any] = {"lengths_q": (70, 0, 33), "lengths_k": (90, 20, 333)} if packed else {"seqlen_q": 70, "seqlen_k": 90}
    call = fp8_call(Case(heads=4, heads_kv=2, right=0, **more), WIDE_Q[0])
    expected = fa.run(request_of(call, DType.BF16)).out
    arrays, descales = [upload(x) for x in (call.q, call.k, call.v)], {name: upload(x) for name, x in call.descales.items()}
    for _ in range(2):
        if packed:
            ends = [upload(x) for x in (call.meant.cu_seqlens_q, call.meant.cu_seqlens_k) if x is not None]
            lengths = call.meant.max_seqlen_q, call.meant.max_seqlen_k
            out = fa.flash_attn_varlen_func(*arrays, *ends, *lengths, causal=True, **descales)
        else:
            out = fa.flash_attn_func(*arrays, causal=True, **descales)
        assert torch.equal(out, expected)


@pytest.mark.skipif(not HAS_WGMMA, reason="wgmma is of Hopper")
def test_on_hopper_a_q_of_16_bits_takes_mma_sync_and_fp8_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the card as it is
    with use_family(Family.FA3, monkeypatch):
        for types, kind in ((WIDE_Q[0], fa.DenseFwdRequest), (Fp8Types(), fa.Fa2FwdRequest)):
            call = fp8_call(Case(seqlen_q=200, seqlen_k=300, heads=4, heads_kv=2), types)
            options = fa.Fp8Options(**{name: upload(x) for name, x in call.descales.items()})
            request = kind(*(upload(x) for x in (call.q, call.k, call.v)), fp8=options)
            assert spec_of(request).arch is SmArch.SM_90
            output = fa.run(request)
            synchronize()
            check_fp8(str(types), call, Run(download(output.out), download(output.lse)), DType.BF16)
