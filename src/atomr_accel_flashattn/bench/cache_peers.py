"""What is compared over a KV cache: the calls of this package, FlashAttention-3 and -4, FlashInfer and cuDNN's graph interface.

A peer that is not installed, does not import, does not do a cell or fails in it raises :class:`~.peers.Refused` with the reason, and its
column says so. What is on ``PYTHONPATH`` counts as installed.
"""

from __future__ import annotations

import importlib
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Protocol

from .peers import Call, Refused, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from .cache_cells import CacheCell
    from .cache_inputs import CacheInputs

__all__ = ["CachePeer", "OurCalls", "cache_peers"]

_WORKSPACE_BYTES: Final = 256 << 20  # of FlashInfer
_WIDE_Q: Final = "it is called with q in 16 bits"


class CachePeer(Protocol):
    """One column."""

    name: str

    def prepare(self, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """For each input set a call that returns o as q is laid out, and that a CUDA graph can capture. Raises anything: a refusal."""


class OurCalls(CachePeer):
    """This package: ``flash_attn_with_kvcache``; ``flash_attn_func`` where there is no cache, a StepPlan made anew where slots are."""

    name = "ours"

    def prepare(self, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """Every cell."""
        from ..functional import flash_attn_func
        from ..with_kvcache import flash_attn_with_kvcache

        if cell.layout == "dense":
            return [lambda x=x: flash_attn_func(x.q, x.k, x.v, causal=True) for x in sets]  # type: ignore[misc]

        if cell.group == "slots":
            return [_planned_step(cell, x) for x in sets]

        def call_of(x: CacheInputs) -> Call:
            new: dict[str, Any] = {} if not cell.appends else {"k": x.new_k, "v": x.new_v, "rotary_cos": x.cos, "rotary_sin": x.sin}
            options = {"cache_seqlens": x.lengths, "block_table": x.table, "causal": True, "rotary_interleaved": False, **new}
            k, v = x.cache(cell.page)
            return lambda: flash_attn_with_kvcache(x.q, k, v, **options)

        return [call_of(x) for x in sets]


def _planned_step(cell: CacheCell, x: CacheInputs) -> Call:
    """The schedule of a step from the lengths on the device, and a call that follows it: the way of a server with slots to fill."""
    import torch

    from ..paged import PagedAttentionRequest
    from ..requests.step_plan import StepPlan
    from ..runtime.execute import run

    k, v = x.cache(cell.page)
    out, asked = torch.empty_like(x.q), {"block_table": x.table, "seq_lens": x.lengths}
    plan = StepPlan.of(PagedAttentionRequest(x.q, k, v, **asked))
    request = PagedAttentionRequest(x.q, k, v, **asked, plan=plan, out=out)

    def call() -> torch.Tensor:
        plan.schedule(x.lengths)
        run(request, lse=False)
        return out

    return call


class _Package(CachePeer):
    """A library that may not be there. ``modules``: the first of them that is found is imported."""

    modules: tuple[str, ...] = ()
    install = ""
    takes_fp8 = False  # as it is called here

    def prepare(self, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """Its own calls, or a refusal."""
        found = [name for name in self.modules if _is_there(name)]
        if not found:
            raise Refused(f"not installed: no module {' or '.join(self.modules)}; {self.install}")
        reason = self.cannot(cell) if self.takes_fp8 or not cell.dtype.is_fp8 else "its calls on fp8 are not written here"
        if reason:
            raise Refused(reason)
        try:
            package: Any = importlib.import_module(found[0])
        except Exception as error:  # a library that was built for another torch or CUDA fails in its own way
            raise Refused(f"does not import: {first_line(error)}") from error
        return self.calls(package, cell, sets)

    def cannot(self, cell: CacheCell) -> str:
        """Why it does not do a cell; empty where it does."""
        raise NotImplementedError

    def calls(self, package: Any, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """A call for each input set."""
        raise NotImplementedError


class Fa3Cache(_Package):
    """FlashAttention-3 by its authors' interface, with the number of splits that it chooses."""

    name = "fa3"
    modules = ("flash_attn_interface",)
    install = "pip install tokenspeed-fa3, or build the folder hopper of FlashAttention"
    takes_fp8 = True

    def cannot(self, cell: CacheCell) -> str:
        """Nothing."""
        del cell
        return ""

    def calls(self, package: Any, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """``flash_attn_with_kvcache``; without a cache too, where it splits few queries."""

        def call_of(x: CacheInputs) -> Call:
            options: dict[str, Any] = {"cache_seqlens": x.lengths, "causal": True, "num_splits": 0}
            if cell.page:
                options["page_table"] = x.table
            if cell.appends:
                options |= {"k": x.new_k, "v": x.new_v, "rotary_cos": x.cos, "rotary_sin": x.sin, "rotary_interleaved": False}
            k, v = x.cache(cell.page)
            return lambda: _first(package.flash_attn_with_kvcache(x.q, k, v, **options))

        return [call_of(x) for x in sets]


class Fa4Cache(_Package):
    """FlashAttention-4, with as many splits as it chooses, or one where its kernel for this GPU has no splits."""

    name = "fa4"
    modules = ("flash_attn.cute.interface",)
    install = "pip install flash-attn-4"

    def cannot(self, cell: CacheCell) -> str:
        """It appends nothing."""
        return "it does not append to a cache" if cell.appends else ""

    def calls(self, package: Any, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """``flash_attn_varlen_func`` with lengths of K, and ``flash_attn_func`` without a cache."""

        def call_of(x: CacheInputs, splits: int) -> Call:
            if cell.layout == "dense":
                return lambda: _first(package.flash_attn_func(x.q, x.k, x.v, causal=True, num_splits=splits))
            k, v = x.cache(cell.page)
            return lambda: _first(
                package.flash_attn_varlen_func(
                    x.q, k, v, seqused_k=x.lengths, page_table=x.table, causal=cell.queries > 1, num_splits=splits
                )
            )

        try:
            call_of(sets[0], 0)()
        except Exception:  # noqa: BLE001 - its refusals are assertions
            return [call_of(x, 1) for x in sets]
        return [call_of(x, 0) for x in sets]


class FlashInfer(_Package):
    """FlashInfer's paged wrappers: decode on tensor cores for one query, prefill for more; planned once, outside of what is timed.

    Over a cache of fp8 with q in 16 bits.
    """

    name = "fi"
    tensor_cores = True
    modules = ("flashinfer",)
    install = "pip install flashinfer-python"
    takes_fp8 = True

    def cannot(self, cell: CacheCell) -> str:
        """Pages only, it appends by another call, and q has 16 bits."""
        if cell.type_of_q.is_fp8:
            return _WIDE_Q
        return "it reads pages only" if not cell.page else "it appends by another call" if cell.appends else ""

    def calls(self, package: Any, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """One plan for all sets, which share lengths and table."""
        x = sets[0]
        workspace = x.q.new_empty(_WORKSPACE_BYTES // x.q.element_size())
        run = (self._decode if cell.queries == 1 else self._prefill)(package, cell, x, workspace)

        def call_of(x: CacheInputs) -> Call:
            cache, q = x.cache(cell.page), x.q.flatten(0, 1)
            return lambda: run(q, cache).view(x.q.shape)

        return [call_of(x) for x in sets]

    def _decode(self, package: Any, cell: CacheCell, x: CacheInputs, workspace: torch.Tensor) -> Callable[..., Any]:
        import torch

        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace.view(torch.uint8), "NHD", use_tensor_cores=self.tensor_cores)
        heads = (cell.heads, cell.heads_kv, cell.head_dim, cell.page)
        wrapper.plan(*_pages_in_use(cell, x), *heads, q_data_type=x.q.dtype, kv_data_type=x.k.dtype)
        run: Callable[..., Any] = wrapper.run
        return run

    @staticmethod
    def _prefill(package: Any, cell: CacheCell, x: CacheInputs, workspace: torch.Tensor) -> Callable[..., Any]:
        import torch

        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace.view(torch.uint8), "NHD", backend="fa2")
        rows = torch.arange(cell.sequences + 1, dtype=torch.int32, device=x.q.device) * cell.queries
        heads = (cell.heads, cell.heads_kv, cell.head_dim, cell.page)
        wrapper.plan(rows, *_pages_in_use(cell, x), *heads, causal=True, q_data_type=x.q.dtype, kv_data_type=x.k.dtype)
        run: Callable[..., Any] = wrapper.run
        return run


class FlashInferCudaCores(FlashInfer):
    """Its decode of one query without tensor cores."""

    name = "fi_cc"
    tensor_cores = False

    def cannot(self, cell: CacheCell) -> str:
        """One query a sequence."""
        return super().cannot(cell) or ("it decodes one query a sequence" if cell.queries > 1 else "")


class Xqa(_Package):
    """TensorRT-LLM's XQA decode kernel, as FlashInfer offers it on Hopper; over fp8 with q in 16 bits."""

    name = "xqa"
    modules = ("flashinfer",)
    install = "pip install flashinfer-python"
    takes_fp8 = True

    def cannot(self, cell: CacheCell) -> str:
        """One query of 16 bits over pages of 16 to 128."""
        if cell.type_of_q.is_fp8:
            return _WIDE_Q
        if cell.queries > 1 or cell.appends:
            return "it is timed with one query a sequence, all of whose keys are there"
        return "" if cell.page in {16, 32, 64, 128} else "it reads pages of 16, 32, 64 and 128"

    def calls(self, package: Any, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """All sets share a workspace, which begins with zeros."""
        import torch

        workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=sets[0].q.device)
        lengths = sets[0].lengths.to(torch.uint32)
        attend, scale = package.decode.xqa_batch_decode_with_kv_cache, cell.head_dim**-0.5

        def call_of(x: CacheInputs) -> Call:
            q, out, cache = x.q.flatten(0, 1), torch.empty_like(x.q), x.cache(cell.page)
            into = out.flatten(0, 1)

            def call() -> torch.Tensor:
                attend(q, cache, workspace, x.table, lengths, cell.slots, bmm1_scale=scale, bmm2_scale=1.0, out=into, kv_layout="NHD")
                return out

            return call

        return [call_of(x) for x in sets]


class CudnnCache(_Package):
    """cuDNN's ``sdpa`` with lengths, and page tables where there are pages."""

    name = "cudnn_fe"
    modules = ("cudnn",)
    install = "pip install nvidia-cudnn-frontend"

    def cannot(self, cell: CacheCell) -> str:
        """It appends nothing."""
        return "it does not append to a cache" if cell.appends else ""

    def calls(self, package: Any, cell: CacheCell, sets: Sequence[CacheInputs]) -> list[Call]:
        """A graph that all sets share. Its handle is told the stream of every call, which a capture changes."""
        import torch

        os.environ.setdefault("CUDNN_FRONTEND_CUDART_LIB_NAME", f"libcudart.so.{(torch.version.cuda or '13').split('.')[0]}")
        handle, single, x = package.create_handle(), package.data_type.FLOAT, sets[0]
        package.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph = package.pygraph(
            io_data_type=package.data_type.BFLOAT16, intermediate_data_type=single, compute_data_type=single, handle=handle
        )
        keys = x.lengths.view(-1, 1, 1, 1)
        rows = torch.full_like(keys, cell.queries)
        sides = {"seq_len_q": graph.tensor_like(rows), "seq_len_kv": graph.tensor_like(keys)}
        fixed: dict[Any, torch.Tensor] = {sides["seq_len_q"]: rows, sides["seq_len_kv"]: keys}
        options: dict[str, Any] = {"use_padding_mask": True, **sides}
        if x.table is not None:
            table = x.table.view(cell.sequences, 1, cell.pages, 1)
            tables = [graph.tensor_like(table) for _ in range(2)]
            fixed |= dict.fromkeys(tables, table)
            options |= {"paged_attention_k_table": tables[0], "paged_attention_v_table": tables[1]}
            options["paged_attention_max_seq_len_kv"] = cell.slots
        if cell.queries > 1:
            options |= {"diagonal_band_right_bound": 0, "diagonal_alignment": package.diagonal_alignment.BOTTOM_RIGHT}
        q, k, v = (graph.tensor_like(_heads_first(each)) for each in (x.q, *x.cache(cell.page)))
        o, _ = graph.sdpa(name="sdpa", q=q, k=k, v=v, generate_stats=False, attn_scale=cell.head_dim**-0.5, **options)
        seen = _heads_first(x.q)
        o.set_output(True).set_dim(list(seen.shape)).set_stride(list(seen.stride()))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([package.heur_mode.A, package.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(max(graph.get_workspace_size(), 16), device=x.q.device, dtype=torch.uint8)

        def call_of(x: CacheInputs) -> Call:
            out = torch.empty_like(x.q)
            tensors = (x.q, *x.cache(cell.page), out)
            pack = fixed | {symbol: _heads_first(each) for symbol, each in zip((q, k, v, o), tensors, strict=True)}

            def call() -> torch.Tensor:
                package.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
                graph.execute(pack, workspace, handle=handle)
                return out

            return call

        return [call_of(x) for x in sets]


def cache_peers(names: tuple[str, ...] | None = None) -> list[CachePeer]:
    """Ours, then the peers; with ``names`` those alone. One that is not installed stays, as a column that says so.

    Raises:
        ValueError: a name that is no peer.
    """
    every: list[CachePeer] = [OurCalls(), Fa3Cache(), Fa4Cache(), FlashInfer(), FlashInferCudaCores(), Xqa(), CudnnCache()]
    if names is None or "all" in names:
        return every
    known = [peer.name for peer in every]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no peer named {', '.join(unknown)}; there are {', '.join(known)}, and all")
    return [peer for peer in every if peer.name in names]


def _pages_in_use(cell: CacheCell, x: CacheInputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's int32 (sequences + 1,) offsets into int32 (pages in use,), and int32 (sequences,) slots used of each last page."""
    import torch

    assert x.table is not None  # noqa: S101 - for the type checker
    lengths, table = x.lengths.cpu(), x.table.cpu()
    used = (lengths + cell.page - 1) // cell.page
    offsets = torch.zeros(cell.sequences + 1, dtype=torch.int32)
    offsets[1:] = used.cumsum(0)
    pages = torch.cat([table[b, : int(n)] for b, n in enumerate(used)])
    last = torch.where(lengths > 0, lengths - (used - 1) * cell.page, 0).int()
    device = x.q.device
    return offsets.to(device), pages.to(device), last.to(device)


def _heads_first(x: torch.Tensor) -> torch.Tensor:
    """(…, S, H, D) as (…, H, S, D)."""
    return x.transpose(1, 2)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # the package around it
        return False
