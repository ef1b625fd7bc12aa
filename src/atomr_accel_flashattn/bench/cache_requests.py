"""The request of a cell of the cache benchmark, and the same with a tile chosen by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cached import CachedFwdRequest
from ..dispatch import DispatchKey, FaFwdDispatch, best_arch, key_of_problem
from ..fa2 import MaskKind
from ..kernels.spec import Tile
from ..problem import ArrayInfo, AttentionProblem
from ..requests.dense import DenseFwdRequest
from ..types import SmArch
from .cache_cells import DENSE

if TYPE_CHECKING:
    from .cache_cells import CacheCell
    from .cache_inputs import CacheInputs

__all__ = ["cache_request"]


@dataclass(frozen=True, slots=True, eq=False)
class _WithTile:
    """A request that is answered with one tile."""

    request: FaFwdDispatch
    tile: Tile

    @property
    def problem(self) -> AttentionProblem:
        """The request's."""
        return self.request.problem

    @property
    def out_array(self) -> ArrayInfo | None:
        """The request's."""
        return self.request.out_array

    def dispatch_key(self, arch: SmArch | None = None) -> DispatchKey:
        """A key like the request's, with the tile demanded."""
        return key_of_problem(self.problem, arch or best_arch(self.problem.q.device), self.out_array, tile=self.tile)


def cache_request(cell: CacheCell, x: CacheInputs, *, tile: Tile | None = None, out: Any = None) -> FaFwdDispatch:
    """The request of a cell; ``tile``: None is the one that calls take. ``out``: an array to write to."""
    request: FaFwdDispatch
    if cell.layout == DENSE:
        request = DenseFwdRequest(x.q, x.k, x.v, mask=MaskKind.causal(), out=out)
    else:
        new: dict[str, Any] = {} if not cell.appends else {"k": x.new_k, "v": x.new_v, "rotary_cos": x.cos, "rotary_sin": x.sin}
        request = CachedFwdRequest(
            x.q, *x.cache(cell.page), x.lengths, block_table=x.table, mask=MaskKind.causal(), rotary_interleaved=False, out=out, **new
        )
    return request if tile is None else _WithTile(request, tile)
