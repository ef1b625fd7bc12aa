"""cuDNN through its own graph interface (package nvidia-cudnn-frontend, module ``cudnn``), which has what SDPA does not pass on to it."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..types import DType
from .cells import FEATURES
from .inputs import out_dtype
from .peers import Call, Peer, Refused, first_line, tried

if TYPE_CHECKING:
    import torch

    from .cells import Cell
    from .inputs import Inputs

__all__ = ["CudnnFrontend"]

# Factors that its graph of fp8 takes as tensors of one float32 each. P, at most 1, is rounded in units of 2^-8, as large as e4m3 holds.
_FP8_FACTORS: Final = {"descale_q": 1.0, "descale_k": 1.0, "descale_v": 1.0, "descale_s": 2.0**-8, "scale_s": 2.0**8, "scale_o": 1.0}


@dataclass(frozen=True, slots=True)
class _Graph:
    """A built graph of one cell. ``constants``: its handles of lengths, offsets and factors of fp8, with their tensors."""

    graph: Any
    q: Any
    k: Any
    v: Any
    o: Any
    constants: dict[Any, torch.Tensor]
    workspace: torch.Tensor
    out_dtype: torch.dtype


class CudnnFrontend(Peer):
    """Bands by their bounds, ALiBi by cuDNN's own slopes (those of the cells), packed sequences by ragged offsets.

    Its ``sdpa`` has no option for softcap or sink tokens (its ``sink_token`` is a number in the denominator, which has no key). In fp8,
    full and causal masks of dense calls are written here.
    """

    name = "cudnn_fe"

    def __init__(self) -> None:
        self._handle: Any = None
        self._cell: Cell | None = None
        self._built: _Graph | None = None

    def prepare(self, cell: Cell, inputs: Inputs) -> Call:
        """A call that allocates o and runs the cell's graph, which is built for its first input set.

        Raises:
            Refused: cuDNN or its frontend does not do the cell, or is not usable here.
        """
        import torch

        missing = [feature for feature in cell.features if feature != FEATURES["alibi"]]
        if missing:
            raise Refused(f"cuDNN's sdpa has no {' or '.join(missing)}")
        if cell.dtype.is_fp8 and (cell.packed or cell.alibi or cell.window is not None or (cell.causal and cell.length_k is not None)):
            raise Refused("of cuDNN's sdpa_fp8, graphs of dense calls with full and causal masks are written here")
        try:
            cudnn = self._package()
            if cell != self._cell:
                self._built, self._cell = None, None  # the last cell's workspace goes first
                self._built, self._cell = self._build(cudnn, cell, inputs), cell
        except Exception as error:  # cuDNN's errors derive from Exception
            raise Refused(first_line(error)) from error
        built, handle = self._built, self._handle
        assert built is not None  # noqa: S101 - for the type checker
        fixed = built.constants | {symbol: _seen(cell, x) for symbol, x in ((built.q, inputs.q), (built.k, inputs.k), (built.v, inputs.v))}

        def call() -> torch.Tensor:
            o = torch.empty_like(inputs.q, dtype=built.out_dtype)
            built.graph.execute(fixed | {built.o: _seen(cell, o)}, built.workspace, handle=handle)
            return o

        return tried(call)

    def _package(self) -> Any:
        """The module, with a handle on torch's current stream."""
        import torch

        # Another peer may have loaded the runtime of another CUDA; without this cuDNN's frontend takes the older one.
        os.environ.setdefault("CUDNN_FRONTEND_CUDART_LIB_NAME", f"libcudart.so.{(torch.version.cuda or '13').split('.')[0]}")
        cudnn: Any = importlib.import_module("cudnn")
        if self._handle is None:
            self._handle = cudnn.create_handle()
            cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        return cudnn

    def _build(self, cudnn: Any, cell: Cell, inputs: Inputs) -> _Graph:
        import torch

        names = {DType.F16: "HALF", DType.BF16: "BFLOAT16", DType.F8E4M3: "FP8_E4M3", DType.F8E5M2: "FP8_E5M2"}
        element = getattr(cudnn.data_type, names[cell.dtype])
        single = cudnn.data_type.FLOAT
        graph = cudnn.pygraph(io_data_type=element, intermediate_data_type=single, compute_data_type=single, handle=self._handle)
        lengths, offsets, constants = _packing(graph, cell, inputs)

        rows, keys = max(cell.lengths), max(cell.keys)

        def declare(name: str, heads: int, length: int) -> Any:
            dim, stride = _dim(cell, heads, length), _stride(cell, heads, length)
            tensor = graph.tensor(name=name, dim=dim, stride=stride, data_type=element)
            return tensor.set_ragged_offset(offsets[heads]) if offsets else tensor

        sides = ("q", cell.heads, rows), ("k", cell.heads_kv, keys), ("v", cell.heads_kv, keys)
        q, k, v = (declare(*side) for side in sides)
        asked: dict[str, Any] = {"q": q, "k": k, "v": v, "generate_stats": False, "attn_scale": cell.head_dim**-0.5}
        made = out_dtype(cell.dtype)
        if cell.dtype.is_fp8:
            made = inputs.q.dtype if _narrows_o(inputs.q.device) else made
            o = _sdpa_fp8(cudnn, graph, cell, asked, constants, inputs.q.device)
            o.set_data_type(element if made == inputs.q.dtype else cudnn.data_type.BFLOAT16)
        else:
            o, _ = graph.sdpa(name="sdpa", **asked, **_mask(cudnn, cell), **lengths)
        o.set_output(True).set_dim(_dim(cell, cell.heads, rows)).set_stride(_stride(cell, cell.heads, rows))
        if offsets:
            o.set_ragged_offset(offsets[cell.heads])
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(graph.get_workspace_size(), 16), device=inputs.q.device, dtype=torch.uint8)
        return _Graph(graph, q, k, v, o, constants, workspace, made)


def _sdpa_fp8(cudnn: Any, graph: Any, cell: Cell, asked: dict[str, Any], constants: dict[Any, torch.Tensor], device: torch.device) -> Any:
    """O, whose type is to be set. ``constants`` gets the factors, and the largest numbers of P and o, which the graph always writes."""
    import torch

    def number(value: float) -> torch.Tensor:
        return torch.full((1, 1, 1, 1), value, dtype=torch.float32, device=device)

    factors = {name: number(value) for name, value in _FP8_FACTORS.items()}
    symbols = {name: graph.tensor_like(tensor) for name, tensor in factors.items()}
    constants |= {symbols[name]: tensor for name, tensor in factors.items()}
    o, _, *largest = graph.sdpa_fp8(name="sdpa_fp8", **asked, **symbols, use_causal_mask=cell.causal)
    for symbol in largest:
        symbol.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(cudnn.data_type.FLOAT)
        constants[symbol] = number(0)
    return o


def _narrows_o(device: torch.device) -> bool:
    """Whether sdpa_fp8 gives o in fp8 alone there: cuDNN writes 16 bits from Blackwell on."""
    import torch

    return device.type == "cuda" and bool(torch.cuda.get_device_capability(device) < (10, 0))


def _packing(graph: Any, cell: Cell, inputs: Inputs) -> tuple[dict[str, Any], dict[int, Any], dict[Any, torch.Tensor]]:
    """Of packed sequences: arguments with their lengths, element offsets by number of heads, and the tensors of both."""
    if inputs.offsets is None:
        return {}, {}, {}
    lengths = inputs.offsets.diff().view(-1, 1, 1, 1)
    offsets = {heads: (inputs.offsets * (heads * cell.head_dim)).view(-1, 1, 1, 1) for heads in {cell.heads, cell.heads_kv}}
    sides = {side: graph.tensor_like(lengths) for side in ("seq_len_q", "seq_len_kv")}
    starts = {heads: graph.tensor_like(tensor) for heads, tensor in offsets.items()}
    constants = dict.fromkeys(sides.values(), lengths) | {starts[heads]: tensor for heads, tensor in offsets.items()}
    return sides, starts, constants


def _mask(cudnn: Any, cell: Cell) -> dict[str, Any]:
    """The arguments of ``sdpa``. A left bound of w leaves each query w keys, itself among them; bounds count from the last key."""
    options: dict[str, Any] = {"use_alibi_mask": cell.alibi, "use_padding_mask": cell.packed}
    if cell.causal:
        options["diagonal_band_right_bound"] = 0
    if cell.window is not None:
        options["diagonal_band_left_bound"] = cell.window
    if cell.length_k is not None and (cell.causal or cell.window is not None):
        options["diagonal_alignment"] = cudnn.diagonal_alignment.BOTTOM_RIGHT
    return options


def _dim(cell: Cell, heads: int, length: int) -> list[int]:
    """(B, H, S, D), of packed sequences with the longest as S."""
    return [cell.batch, heads, length, cell.head_dim]


def _stride(cell: Cell, heads: int, length: int) -> list[int]:
    """Of (B, H, S, D), in elements, where memory has (B, S, H, D)."""
    row = heads * cell.head_dim
    return [length * row, cell.head_dim, row, 1]


def _seen(cell: Cell, x: torch.Tensor) -> torch.Tensor:
    """The tensor as the graph was told it: (B, H, S, D); packed ones as they lie."""
    return x if cell.packed else x.transpose(1, 2)
