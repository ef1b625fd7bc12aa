"""The forward benchmark: every cell, the peers taking turns, checked before it is timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..dispatch import lookup
from ..errors import FlashAttnError
from ..kernels.spec import Family
from .cells import Cell, select
from .families import OfFamily, request_of
from .inputs import ERROR_LIMIT, Inputs, check_rows, make_inputs
from .other_peers import importable_peers, named_peers
from .peers import CudnnPeer, Ours, Peer, Refused, TorchFa2
from .timing import Contestant, measure_in_turns

if TYPE_CHECKING:
    import torch

__all__ = ["Options", "Report", "Result", "Row", "ceilings", "chosen_peers", "run_forward"]

MATMUL_SIZE = 8192
COPY_BYTES = 1 << 32
OURS = "ours"
EVERY_PEER = "all"


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
    error: float | None = None  # relative, of sampled rows against float32
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


def run_forward(options: Options, progress: Callable[[Row], None] | None = None) -> Report:
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
    peers = chosen_peers(options)
    with torch.no_grad():
        report.ceilings.append(ceilings())
        for cell in select(options.cells):
            if time.perf_counter() - began > options.budget:
                report.skipped.append(str(cell))
                continue
            row = _run_cell(cell, peers, options, report.ceilings[0]["matmul_bf16_tflops"])
            report.rows.append(row)
            if progress is not None:
                progress(row)
        report.ceilings.append(ceilings())
    report.seconds = time.perf_counter() - began
    return report


def _card() -> tuple[torch.device, int]:
    """The current device and the bytes of its L2 cache."""
    import torch

    index = torch.cuda.current_device()
    return torch.device("cuda", index), torch.cuda.get_device_properties(index).L2_cache_size


def chosen_peers(options: Options) -> list[Peer]:
    """Ours first, then those asked for; with none named, those that are installed but FlexAttention, which compiles for seconds a cell.

    Raises:
        ValueError: a name that is no peer or no family.
    """
    families = [_family(name) for name in options.families]
    ours: list[Peer] = [OfFamily(family, f"{OURS}_{family.value}" if n else OURS) for n, family in enumerate(families)] or [Ours()]
    there: list[Peer] = [*ours, TorchFa2(), CudnnPeer(), *(importable_peers() if options.peers is None else named_peers())]
    if options.peers is None or EVERY_PEER in options.peers:
        return there
    known = [peer.name for peer in there]
    unknown = sorted(set(options.peers) - set(known))
    if unknown:
        raise ValueError(f"no peer named {', '.join(unknown)}; there are {', '.join(known)}, and {EVERY_PEER}")
    return [peer for peer in there if peer.name in options.peers]


def _family(name: str) -> Family:
    known = [family.value for family in Family]
    if name not in known:
        raise ValueError(f"no family named {name}; there are {', '.join(known)}")
    return Family(name)


def _run_cell(cell: Cell, peers: Sequence[Peer], options: Options, ceiling: float) -> Row:
    device, l2_bytes = _card()
    sets = make_inputs(cell, device, l2_bytes=l2_bytes, seed=options.seed)
    results: dict[str, Result] = {}
    contestants = dict(_prepare(cell, peers, sets, results))
    computed = {peer.name: peer.computed(cell) for peer in peers}
    for name, timing in measure_in_turns(contestants, rounds=options.rounds, seed=options.seed).items():
        result = results[name]
        result.ms, result.spread, result.rounds = timing.ms, timing.spread, timing.rounds
        result.tflops = computed[name].flops / timing.ms * 1e-9
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
        kernel=lookup(request_of(cell, sets[0], _family(options.families[0]) if options.families else None).dispatch_key()).kernel_name,
        flops=cell.flops,
        results=results,
        ratios=ratios,
    )


def _prepare(cell: Cell, peers: Sequence[Peer], sets: Sequence[Inputs], results: dict[str, Result]) -> Iterator[tuple[str, Contestant]]:
    """Make every peer's calls and check their first output; a peer that refuses gets a result that says why."""
    for peer in peers:
        result = results[peer.name] = Result(peer=peer.name)
        try:
            with peer.context():
                calls = [peer.prepare(cell, inputs) for inputs in sets]
                out = calls[0]()
        except Refused as reason:
            result.refused = str(reason)
            continue
        except (RuntimeError, FlashAttnError) as error:
            result.refused = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            continue
        computed = peer.computed(cell)
        result.error = check_rows(computed, sets[0], out)
        limit = ERROR_LIMIT[cell.dtype]
        if result.error > limit:
            result.refused = f"wrong: relative error {result.error:.3g}, at most {limit:g} allowed; not timed"
            continue
        missing = [feature for feature in cell.features if feature not in computed.features]
        if missing:
            result.note = f"without {' and '.join(missing)}"
        yield peer.name, Contestant(calls, peer.context)
