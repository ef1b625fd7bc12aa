"""What the benchmarks of forward and backward share.

In every cell the peers take turns, and each is checked before it is timed.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import FeatureNotBuiltError, FlashAttnError
from ..types import DType
from .inputs import Inputs, make_inputs
from .peers import Call, Peer, Refused, first_line
from .timing import Contestant, measure_in_turns

if TYPE_CHECKING:
    import torch

    from .cells import Cell

__all__ = ["OURS", "Direction", "Options", "Report", "Result", "Row", "card", "ceilings", "run_cells"]

MATMUL_SIZE = 8192
COPY_BYTES = 1 << 32
OURS = "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to run.

    Attributes:
        cells: comma-separated patterns of cell names, None is all.
        rounds: how often each peer is timed in a cell.
        budget: seconds after which no further cell is begun.
        peers: names, or "all"; one that is not installed stays as a column that says so. None is all that are installed, but those that
            take long to prepare.
        families: of our kernels, "fa2" or "fa3": the first is the column ``ours``, others are columns beside it; none is what users'
            calls take.
        seed: of the inputs and of the order in which peers take turns.
    """

    cells: str | None = None
    rounds: int = 5
    budget: float = 600.0
    peers: tuple[str, ...] | None = None
    families: tuple[str, ...] = ()
    seed: int = 0


@dataclass(slots=True, kw_only=True)
class Result:
    """One peer in one cell. Without a time, ``refused`` says why."""

    peer: str
    ms: float | None = None
    spread: float | None = None  # (max - min) / median over the rounds
    tflops: float | None = None
    ceiling_share: float | None = None  # of the measured bf16 matmul
    error: float | None = None  # relative, of what is sampled of the answer, against float32
    rounds: list[float] = field(default_factory=list)
    refused: str | None = None
    note: str = ""  # what of the cell it does without


@dataclass(slots=True, kw_only=True)
class Row:
    """One cell. ``ratios``: our speed over each peer's (above 1: ours is faster)."""

    cell: str
    group: str
    head_dim: int
    heads: int
    heads_kv: int
    mask: str
    length: str
    batch: int
    alibi: bool
    softcap: float
    sink_tokens: int
    score_std: float
    deterministic: bool
    kernel: str  # ours
    flops: float
    results: dict[str, Result]
    ratios: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Report:
    """All rows, the measured ceilings before and after, and the geometric mean of the ratios per peer."""

    rows: list[Row] = field(default_factory=list)
    ceilings: list[dict[str, float]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # cells for which the budget did not last
    not_built: list[str] = field(default_factory=list)  # cells that this version refuses, and why
    seconds: float = 0.0

    @property
    def geometric_means(self) -> dict[str, float]:
        """Per peer, over the cells both did."""
        names = {name for row in self.rows for name in row.ratios}
        return {name: statistics.geometric_mean([row.ratios[name] for row in self.rows if name in row.ratios]) for name in sorted(names)}

    @property
    def worst(self) -> dict[str, tuple[str, float]]:
        """Per peer, the cell with the lowest ratio."""
        return {
            name: min(((row.cell, row.ratios[name]) for row in self.rows if name in row.ratios), key=lambda pair: pair[1])
            for name in self.geometric_means
        }

    @property
    def failures(self) -> list[str]:
        """Cells that we did not do, or did wrong; empty in a run that counts."""
        return [f"{row.cell}: {row.results[OURS].refused}" for row in self.rows if OURS in row.results and row.results[OURS].refused]

    def as_dict(self) -> dict[str, Any]:
        """For the JSON record."""
        return asdict(self) | {"geometric_means": self.geometric_means, "worst": self.worst, "failures": self.failures}


class Direction(ABC):
    """Which half of attention is measured, and all that depends on it.

    Attributes:
        NAME: of the direction, which records are called by.
        ERROR_LIMIT: by element type, what the relative error of an answer may be.
    """

    NAME: ClassVar[str]
    ERROR_LIMIT: ClassVar[Mapping[DType, float]]

    @abstractmethod
    def cells(self, patterns: str | None) -> list[Cell]:
        """Its cells, those that match; ValueError where none does."""

    @abstractmethod
    def peers(self, options: Options) -> list[Peer]:
        """Its columns, ours first."""

    def inputs(self, cell: Cell, device: torch.device, l2_bytes: int, seed: int) -> list[Inputs]:
        """Input sets of a cell, together more than the L2 cache holds."""
        return make_inputs(cell, device, l2_bytes=l2_bytes, seed=seed)

    @abstractmethod
    def prepare(self, peer: Peer, cell: Cell, inputs: Inputs) -> Call:
        """A call of a peer that gives the answer of a cell each time. Raises Refused."""

    def context(self, peer: Peer, cell: Cell) -> AbstractContextManager[Any]:  # noqa: ARG002 - a backward has cells that differ
        """Entered around every call of a peer."""
        return peer.context()

    @abstractmethod
    def error(self, cell: Cell, inputs: Inputs, answer: Any) -> float:
        """Relative error of an answer against float32."""

    @abstractmethod
    def flops(self, cell: Cell) -> float:
        """Floating-point operations of a cell."""

    @abstractmethod
    def kernel_name(self, cell: Cell, inputs: Inputs, options: Options) -> str:
        """Name of our kernel; FeatureNotBuiltError where there is none yet."""


def run_cells(direction: Direction, options: Options, progress: Callable[[Row], None] | None = None) -> Report:
    """Run the chosen cells on the current CUDA device; ``progress`` is called with each finished row.

    Raises:
        ValueError: no cell or no peer matches.
        RuntimeError: no CUDA device.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("the benchmark needs a CUDA device and a torch that sees it; this machine has none")
    began = time.perf_counter()
    report = Report()
    peers = direction.peers(options)
    with torch.no_grad():
        report.ceilings.append(ceilings())
        for cell in direction.cells(options.cells):
            if time.perf_counter() - began > options.budget:
                report.skipped.append(str(cell))
                continue
            try:
                row = _run_cell(direction, cell, peers, options, report.ceilings[0]["matmul_bf16_tflops"])
            except FeatureNotBuiltError as refusal:
                report.not_built.append(f"{cell}: {refusal.feature}: {refusal.reason}")
                continue
            report.rows.append(row)
            if progress is not None:
                progress(row)
        report.ceilings.append(ceilings())
    report.seconds = time.perf_counter() - began
    return report


def ceilings() -> dict[str, float]:
    """What this card does now: bf16 matmul TFLOP/s (8192 cubed) and copy GB/s (bytes read plus written), random input."""
    import torch

    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)

    def copy() -> object:
        return target.copy_(source)

    timings = measure_in_turns(
        {"matmul": Contestant([lambda: a @ b], torch.no_grad), "copy": Contestant([copy], torch.no_grad)}, rounds=3, seed=0
    )
    return {
        "matmul_bf16_tflops": 2 * MATMUL_SIZE**3 / timings["matmul"].ms * 1e-9,
        "copy_gbs": 2 * COPY_BYTES / timings["copy"].ms * 1e-6,
    }


def card() -> tuple[torch.device, int]:
    """The current device and the bytes of its L2 cache."""
    import torch

    index = torch.cuda.current_device()
    return torch.device("cuda", index), torch.cuda.get_device_properties(index).L2_cache_size


def _run_cell(direction: Direction, cell: Cell, peers: Sequence[Peer], options: Options, ceiling: float) -> Row:
    device, l2_bytes = card()
    sets = direction.inputs(cell, device, l2_bytes, options.seed)
    kernel = direction.kernel_name(cell, sets[0], options)
    results: dict[str, Result] = {}
    contestants = dict(_prepare(direction, cell, peers, sets, results))
    computed = {peer.name: peer.computed(cell) for peer in peers}
    for name, timing in measure_in_turns(contestants, rounds=options.rounds, seed=options.seed).items():
        result = results[name]
        result.ms, result.spread, result.rounds = timing.ms, timing.spread, timing.rounds
        result.tflops = direction.flops(computed[name]) / timing.ms * 1e-9
        result.ceiling_share = result.tflops / ceiling
    ours = results[OURS].ms if OURS in results else None
    ratios = {name: r.ms / ours for name, r in results.items() if ours and r.ms and name != OURS}
    return Row(
        cell=str(cell),
        group=cell.group,
        head_dim=cell.head_dim,
        heads=cell.heads,
        heads_kv=cell.heads_kv,
        mask=cell.mask,
        length=cell.length,
        batch=cell.batch,
        alibi=cell.alibi,
        softcap=cell.softcap,
        sink_tokens=cell.sink_tokens,
        score_std=cell.score_std,
        deterministic=cell.deterministic,
        kernel=kernel,
        flops=direction.flops(cell),
        results=results,
        ratios=ratios,
    )


def _prepare(
    direction: Direction, cell: Cell, peers: Sequence[Peer], sets: Sequence[Inputs], results: dict[str, Result]
) -> Iterator[tuple[str, Contestant]]:
    """Make every peer's calls and check their first answer; who refuses has a result that says why."""
    for peer in peers:
        result = results[peer.name] = Result(peer=peer.name)
        context = partial(direction.context, peer, cell)
        try:
            with context():
                calls = [direction.prepare(peer, cell, inputs) for inputs in sets]
                answer = calls[0]()
        except Refused as reason:
            result.refused = str(reason)
            continue
        except (RuntimeError, FlashAttnError) as error:
            result.refused = first_line(error)
            continue
        computed = peer.computed(cell)
        result.error = direction.error(computed, sets[0], answer)
        limit = direction.ERROR_LIMIT[cell.dtype]
        if result.error > limit:
            result.refused = f"wrong: relative error {result.error:.3g}, at most {limit:g} allowed; not timed"
            continue
        missing = [feature for feature in cell.features if feature not in computed.features]
        if missing:
            result.note = f"without {' and '.join(missing)}"
        yield peer.name, Contestant(calls, context)
