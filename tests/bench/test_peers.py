"""The peers that a machine may lack: packages stood in by what they promise, and what a run says of those that are not there."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.bench import cudnn_frontend, entry, forward, measure, other_peers  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.cells import Cell  # noqa: E402
from atomr_accel_flashattn.bench.families import OursSingleLevel  # noqa: E402
from atomr_accel_flashattn.bench.figure import STYLES  # noqa: E402
from atomr_accel_flashattn.bench.forward import chosen_peers  # noqa: E402
from atomr_accel_flashattn.bench.inputs import Inputs, check_rows, make_inputs  # noqa: E402
from atomr_accel_flashattn.bench.measure import Options  # noqa: E402
from atomr_accel_flashattn.bench.other_peers import Absent, FlashAttnPackage, FlexPeer, XformersFa3, importable_peers, named_peers  # noqa: E402
from atomr_accel_flashattn.bench.peers import OursBf16, Peer, Refused  # noqa: E402
from atomr_accel_flashattn.cli.bench import PEERS_HELP  # noqa: E402
from atomr_accel_flashattn.functional import flash_attn_func, flash_attn_varlen_func  # noqa: E402
from atomr_accel_flashattn.types import DType  # noqa: E402

pytestmark = pytest.mark.torch

SIZES: dict[str, Any] = {"head_dim": 64, "heads": 4, "heads_kv": 4, "lengths": (96, 96), "causal": True}
ALIBI = Cell(group="alibi", alibi=True, **SIZES)
SOFTCAP = Cell(group="softcap", softcap=2.0, **SIZES)
SINKS = Cell(group="sink4", window=16, sink_tokens=4, **SIZES)
SHORT = Cell(group="gqa", **SIZES | {"heads_kv": 2, "lengths": (16, 16), "length_k": 200})
FP8 = [Cell(group="fp8", **SIZES | {"causal": causal}, dtype=DType.F8E4M3) for causal in (False, True)]
PACKED = Cell(group="varlen", packed=True, **SIZES | {"lengths": (20, 96, 70)})
CELLS = [
    Cell(group="grid", **SIZES),
    Cell(group="grid", **SIZES | {"causal": False}),
    Cell(group="gqa", **SIZES | {"heads_kv": 2}),
    Cell(group="window", window=16, **SIZES),
    PACKED,
    SHORT,
    SOFTCAP,
    ALIBI,
    SINKS,
]


def inputs_of(cell: Cell) -> Inputs:
    return make_inputs(cell, torch.device("cpu"), l2_bytes=0)[0]


def assert_right(peer: Peer, cell: Cell, limit: float = 1e-2) -> None:
    inputs = inputs_of(cell)
    call = peer.prepare(cell, inputs)
    assert check_rows(cell, inputs, call()) < limit


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine without any of the packages; what is put into the dict is there."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(other_peers, "find_spec", found.get)
    return found


# --- which columns there are -------------------------------------------------------------------------------------------------------------


def test_packages_are_columns_where_they_are_installed(nothing_installed: dict[str, Any]) -> None:
    assert importable_peers() == []
    nothing_installed |= {"cudnn": object(), "flash_attn.cute": object()}
    assert [peer.name for peer in importable_peers()] == ["fa4", "cudnn_fe"]
    assert [peer.name for peer in chosen_peers(Options())] == ["ours", "fa2", "cudnn", "fa4", "cudnn_fe"]
    nothing_installed["flash_attn_interface"] = object()
    assert [peer.name for peer in importable_peers()] == ["fa3", "fa4", "cudnn_fe"]


def test_xformers_is_a_source_of_fa3_when_it_has_the_library(nothing_installed: dict[str, Any], tmp_path: Path) -> None:
    nothing_installed["xformers"] = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    assert importable_peers() == []
    (tmp_path / "flash_attn_3").mkdir()
    (tmp_path / "flash_attn_3" / "_C.so").touch()
    assert [peer.name for peer in importable_peers()] == ["fa3"]


@pytest.mark.usefixtures("nothing_installed")
def test_a_missing_peer_that_is_asked_for_says_what_to_install() -> None:
    peers = {peer.name: peer for peer in chosen_peers(Options(peers=("fa3", "fa4", "cudnn_fe")))}
    for name, package in (
        ("fa3", "pip install xformers"),
        ("fa4", "pip install flash-attn-4"),
        ("cudnn_fe", "pip install nvidia-cudnn-frontend"),
    ):
        assert isinstance(peers[name], Absent)
        with pytest.raises(Refused, match=f"not installed: .*{package}"):
            peers[name].prepare(CELLS[0], inputs_of(CELLS[0]))


@pytest.mark.usefixtures("nothing_installed")
def test_all_is_every_name_and_the_help_and_the_picture_know_each() -> None:
    names = [peer.name for peer in chosen_peers(Options(peers=("all",)))]
    assert names == ["ours", "fa2", "cudnn", "fa3", "fa4", "cudnn_fe", "flex", "ours_bf16", "ours_single_level"]
    assert set(names) <= STYLES.keys()
    assert [name for name in names if name not in PEERS_HELP] == []


@pytest.mark.usefixtures("nothing_installed")
def test_a_run_names_the_peer_that_is_missing_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "card", lambda: (torch.device("cpu"), 0))
    monkeypatch.setattr(measure, "ceilings", lambda: {"matmul_bf16_tflops": 700.0, "copy_gbs": 4000.0})
    monkeypatch.setattr(forward, "select", lambda _patterns: CELLS[:2])
    timing = SimpleNamespace(ms=1.0, spread=0.0, rounds=[1.0])
    monkeypatch.setattr(measure, "measure_in_turns", lambda contestants, **_options: dict.fromkeys(contestants, timing))
    monkeypatch.setattr(entry, "make_record", lambda kind, body, commit: {"kind": kind, "commit": commit, **HEAD, **body})
    lines: list[str] = []
    report, _ = entry.main(Options(peers=("ours", "fa4")), out=tmp_path, picture=False, say=lines.append)
    assert report.failures == []
    assert [row.results["ours"].ms for row in report.rows] == [1.0, 1.0]
    assert "fa4 has no time in 2 of 2 cells: not installed: no module flash_attn.cute; pip install flash-attn-4" in lines


HEAD = {"timestamp": "2026-01-02T03:04:05+00:00", "device": {"name": "No Card"}, "versions": {}}


# --- the authors' packages, and xformers' ------------------------------------------------------------------------------------------------


def test_packages_of_the_authors_are_called_as_they_document(monkeypatch: pytest.MonkeyPatch, nothing_installed: dict[str, Any]) -> None:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_func = lambda q, k, v, **options: (flash_attn_func(q, k, v, **options), None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    nothing_installed["flash_attn_interface"] = object()
    (peer,) = importable_peers()
    for cell in CELLS[:-2]:
        assert_right(peer, cell, 5e-3)
    for cell, feature in ((ALIBI, "ALiBi"), (SINKS, "sink tokens")):
        with pytest.raises(Refused, match=f"^fa3 has no {feature}$"):
            peer.prepare(cell, inputs_of(cell))


def test_a_package_that_does_not_import_or_raises_is_a_reason_and_not_the_end() -> None:
    def no_import() -> Any:
        raise OSError("libcudart.so.12: cannot open shared object file\nand more")

    def no_answer(*_arrays: Any, **_options: Any) -> Any:
        raise AssertionError("head dim 256 is not supported")

    with pytest.raises(Refused, match=r"^does not import: OSError: libcudart.so.12: cannot open shared object file$"):
        FlashAttnPackage("fa3", no_import).prepare(CELLS[0], inputs_of(CELLS[0]))
    with pytest.raises(Refused, match=r"^AssertionError: head dim 256 is not supported$"):
        FlashAttnPackage("fa4", lambda: SimpleNamespace(flash_attn_func=no_answer)).prepare(CELLS[0], inputs_of(CELLS[0]))


def fa3_operator(q: Any, k: Any, v: Any, **options: Any) -> tuple[Any, ...]:
    """The arguments that are used here, under the operator's names; anything else is refused as it would be."""
    assert options.pop("softmax_scale") == q.shape[-1] ** -0.5
    assert options.pop("num_splits") == 1
    window = options.pop("window_size_left"), options.pop("window_size_right")
    causal, cap = options.pop("is_causal"), options.pop("softcap")
    if not options:
        return (flash_attn_func(q, k, v, causal=causal, window_size=window, softcap=cap), None, None, None)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    packing = [options.pop(name) for name in names]
    assert not options
    return (flash_attn_varlen_func(q, k, v, *packing, causal=causal, window_size=window), None, None, None)


@pytest.mark.parametrize("cell", CELLS[:-2], ids=str)
def test_the_operator_of_xformers_is_called_by_its_names(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_peers.importlib, "import_module", lambda _name: None)
    registered = SimpleNamespace(fwd=SimpleNamespace(default=fa3_operator))
    monkeypatch.setattr(torch.ops, "flash_attn_3", registered, raising=False)
    assert_right(FlashAttnPackage("fa3", XformersFa3), cell, 5e-3)


# --- FlexAttention -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was asked of the compiler; it takes seconds to minutes on a CPU and is left out."""
    asked: list[Any] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: asked.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda function, **options: (asked.append(options.get("dynamic", "")), function)[1])
    return asked


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
@pytest.mark.parametrize("cell", [cell for cell in CELLS if not cell.packed], ids=str)
@pytest.mark.usefixtures("compiled")
def test_flex_attention_does_what_the_cell_says(cell: Cell) -> None:
    assert_right(FlexPeer(), cell)


@pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
def test_flex_attention_is_compiled_once_for_each_cell(compiled: list[Any]) -> None:
    peer = FlexPeer()
    for cell in (CELLS[0], CELLS[0], CELLS[2]):
        assert_right(peer, cell)
    # Shapes are fixed (dynamic=False); what FlexAttention itself compiles when it is not compiled leaves the empty text.
    assert [asked for asked in compiled if asked != ""] == ["reset", False] * 2


# --- cuDNN's frontend --------------------------------------------------------------------------------------------------------------------


class Tensor:
    """A declared tensor of a graph."""

    def __init__(self, dim: list[int] | None = None, stride: list[int] | None = None) -> None:
        self.dim, self.stride, self.offset = dim, stride, None

    def set_output(self, _yes: bool) -> Tensor:
        return self

    def set_dim(self, dim: list[int]) -> Tensor:
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> Tensor:
        self.stride = stride
        return self

    def set_data_type(self, kind: str) -> Tensor:
        self.kind = kind
        return self

    def set_ragged_offset(self, offset: Tensor) -> Tensor:
        self.offset = offset
        return self

    def sequence(self, pack: dict[Tensor, Any], b: int, rows: int) -> Any:
        """(H, rows, D) of sequence b, read from memory by the declared strides, as cuDNN would."""
        start = int(pack[self.offset].flatten()[b]) if self.offset else b * self.stride[0]
        data = pack[self]
        return data.as_strided((self.dim[1], rows, self.dim[3]), self.stride[1:], start)


class Graph:
    """The part of ``cudnn.pygraph`` that is used, evaluated in float32."""

    built = 0

    def __init__(self, **_types: Any) -> None:
        self.options: dict[str, Any] = {}
        self.factors: dict[str, Tensor] = {}

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> Tensor:
        assert name in "qkv"
        assert data_type in {"bf16", "e4m3"}
        return Tensor(dim, stride)

    def tensor_like(self, x: Any) -> Tensor:
        assert x.dtype in {torch.int32, torch.float32}
        return Tensor(list(x.shape), list(x.stride()))

    def sdpa(self, **options: Any) -> tuple[Tensor, None]:
        assert options.pop("generate_stats") is False
        self.options, self.o = options, Tensor()
        return self.o, None

    def sdpa_fp8(self, *, use_causal_mask: bool, **options: Any) -> tuple[Tensor, None, Tensor, Tensor]:
        self.factors = {name: options.pop(name) for name in [*options] if "scale_" in name and name != "attn_scale"}
        self.largest = Tensor(), Tensor()
        bounds = {"diagonal_band_right_bound": 0} if use_causal_mask else {}
        o, _ = self.sdpa(**options, **bounds, use_alibi_mask=False, use_padding_mask=False)
        return o, None, *self.largest

    def build_plans(self) -> None:
        Graph.built += 1

    def get_workspace_size(self) -> int:
        return 0

    validate = build_operation_graph = check_support = create_execution_plans = lambda *_arguments: None

    def execute(self, pack: dict[Tensor, Any], workspace: Any, *, handle: str) -> None:
        assert (workspace.dtype, handle) == (torch.uint8, "handle")
        q, k, v = (self.options[name] for name in "qkv")
        if self.factors:
            assert {pack[x].item() for x in self.factors.values()} == {1, 2**8, 2**-8}
            assert {x.kind: pack[x].item() for x in self.largest} == {"f32": 0}
            assert self.o.kind == {torch.bfloat16: "bf16", torch.float8_e4m3fn: "e4m3"}[pack[self.o].dtype]
        for b in range(q.dim[0]):
            rows, keys = q.dim[2], k.dim[2]
            if self.options["use_padding_mask"]:
                assert torch.equal(pack[self.options["seq_len_q"]], pack[self.options["seq_len_kv"]])
                rows = keys = int(pack[self.options["seq_len_q"]].flatten()[b])
            self._attend(*(x.sequence(pack, b, length) for x, length in ((q, rows), (k, keys), (v, keys), (self.o, rows))))

    def _attend(self, q: Any, k: Any, v: Any, o: Any) -> None:
        group = q.shape[0] // k.shape[0]
        k, v = (x.float().repeat_interleave(group, 0) for x in (k, v))
        scores = q.float() @ k.transpose(1, 2) * self.options["attn_scale"]
        first = k.shape[1] - q.shape[1] if self.options.get("diagonal_alignment") == "bottom right" else 0
        i, j = first + torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])[None]
        if self.options["use_alibi_mask"]:
            slopes = torch.tensor([2.0 ** (-8 * (h + 1) / q.shape[0]) for h in range(q.shape[0])])
            scores = scores + slopes[:, None, None] * (j - i)
        left, right = self.options.get("diagonal_band_left_bound", 10**6), self.options.get("diagonal_band_right_bound", 10**6)
        o.copy_(scores.masked_fill((j > i + right) | (i - j >= left), -torch.inf).softmax(-1) @ v)


@pytest.fixture
def frontend(monkeypatch: pytest.MonkeyPatch, nothing_installed: dict[str, Any]) -> Peer:
    module: Any = ModuleType("cudnn")
    module.data_type = SimpleNamespace(HALF="f16", BFLOAT16="bf16", FLOAT="f32", FP8_E4M3="e4m3")
    module.diagonal_alignment = SimpleNamespace(BOTTOM_RIGHT="bottom right")
    module.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
    module.create_handle = lambda: "handle"
    module.set_stream = lambda **_options: None
    module.pygraph = Graph
    monkeypatch.setitem(sys.modules, "cudnn", module)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setenv("CUDNN_FRONTEND_CUDART_LIB_NAME", "libcudart.so.13")
    monkeypatch.setattr(Graph, "built", 0)
    nothing_installed["cudnn"] = object()
    (peer,) = importable_peers()
    return peer


@pytest.mark.parametrize(
    "cell", [*CELLS[:6], ALIBI, Cell(group="varlen", packed=True, **SIZES | {"lengths": (20, 96, 70), "heads_kv": 2}), *FP8], ids=str
)
def test_the_graph_of_cudnn_says_what_the_cell_is(cell: Cell, frontend: Peer) -> None:
    assert_right(frontend, cell)


@pytest.mark.parametrize("cell", FP8, ids=str)
def test_cudnn_writes_o_in_fp8_where_it_gives_no_other(cell: Cell, frontend: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_frontend, "_narrows_o", lambda _device: True)
    assert_right(frontend, cell, limit=4e-2)
    assert frontend.prepare(cell, inputs_of(cell))().dtype == torch.float8_e4m3fn


def test_cudnn_refuses_what_its_graph_has_no_option_for(frontend: Peer) -> None:
    for cell, feature in ((SOFTCAP, "softcap"), (SINKS, "sink tokens")):
        with pytest.raises(Refused, match=f"^cuDNN's sdpa has no {feature}$"):
            frontend.prepare(cell, inputs_of(cell))


def test_cudnn_refuses_fp8_of_which_no_graph_is_written(frontend: Peer) -> None:
    for cell in (CELLS[3], PACKED, SHORT, ALIBI):
        with pytest.raises(Refused, match="graphs of dense calls with full and causal masks"):
            frontend.prepare(replace(cell, dtype=DType.F8E4M3), inputs_of(CELLS[0]))


def test_a_graph_is_built_once_for_each_cell(frontend: Peer) -> None:
    for cell in (CELLS[0], CELLS[0], CELLS[2], CELLS[0]):
        assert_right(frontend, cell)
    assert Graph.built == 3


def test_what_cudnn_does_not_support_is_a_reason(frontend: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    class NotSupportedError(Exception):
        pass

    def refuse(_self: Graph) -> None:
        raise NotSupportedError("No valid execution plans built.")

    monkeypatch.setattr(Graph, "check_support", refuse)
    for _ in range(2):
        with pytest.raises(Refused, match=r"^NotSupportedError: No valid execution plans built.$"):
            frontend.prepare(CELLS[0], inputs_of(CELLS[0]))


def test_named_peers_are_those_that_are_installed_and_the_rest(frontend: Peer) -> None:
    assert [(peer.name, isinstance(peer, Absent)) for peer in named_peers()] == [
        ("fa3", True),
        ("fa4", True),
        (frontend.name, False),
        ("flex", False),
        ("ours_bf16", False),
    ]


@pytest.mark.parametrize("cell", FP8, ids=str)
def test_ours_in_bf16_stands_beside_cells_of_fp8(cell: Cell) -> None:
    assert_right(OursBf16(), cell)
    with pytest.raises(Refused, match="beside cells of fp8"):
        OursBf16().prepare(CELLS[0], inputs_of(CELLS[0]))


def test_a_single_level_stands_beside_cells_of_fp8_that_wgmma_answers() -> None:
    with pytest.raises(Refused, match="beside cells of fp8"):
        OursSingleLevel().prepare(CELLS[0], inputs_of(CELLS[0]))
    with pytest.raises(Refused, match="nothing but wgmma"):  # the CPU backend
        OursSingleLevel().prepare(FP8[0], inputs_of(FP8[0]))
