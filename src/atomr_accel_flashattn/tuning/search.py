"""The search: on every shape, compile what fits, check it and time it once; then let the fastest run against each other.

Schedules (``tile_space.SCHEDULES``) cut nothing differently, so only the fastest tiles of a shape are tried with all of them. Shapes that
share a winner have the same finalists. The final is run in shuffled turns with the tile in use among them, so that what is compared ran
on a card in the same state.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import inf
from typing import TYPE_CHECKING, TypeAlias

from ..bench.cache_cells import CacheCell
from ..bench.cache_inputs import make_cache_inputs
from ..bench.cache_requests import cache_request
from ..bench.cells import Cell
from ..bench.families import request_of
from ..bench.gradients import backward_request_of
from ..bench.graphs import clock_of
from ..bench.inputs import make_inputs
from ..bench.timing import Contestant, measure_in_turns
from ..dispatch import DispatchKey, best_arch, key_of_problem, lookup
from ..errors import DispatchError
from ..jit.compile import compile_many
from ..kernels.attention import AttentionSpec
from ..kernels.fa3_fwd import WARPGROUP_ROWS
from ..kernels.kvcache import Fa2KvCacheSpec
from ..kernels.spec import Family, Tile
from ..tiles.space import SCHEDULES, misfit, tiles_that_fit
from .groups import Group, by_kernel
from .trial import BackwardStand, CacheStand, ForwardStand, Shape, Stand, Trial

if TYPE_CHECKING:
    import torch

__all__ = ["Options", "ShapeResult", "Watch", "tune_shapes"]

Watch: TypeAlias = Callable[[str, int, int], None]  # (what is being done, how many are done, of how many)

_COMPILED_AT_ONCE = 64  # candidates after which the clock is looked at
_SCREENED_AT_ONCE = 16  # candidates that share a shuffled round
_SCREENING = 0.8  # of the budget; the rest is for the finals
_FASTEST = 8  # tiles of a shape whose other schedules are tried, and finalists by their mean
_NEAR = 1.15  # times the fastest screening that is still worth more


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to search.

    Attributes:
        family: of kernels; None is the one that calls take.
        backward: whether the kernels are those of gradients.
        tiles: patterns of tiles as kernel names write them (``m128n64*``); none is every tile that fits.
        rounds: how often each finalist is timed.
        budget: seconds after which no shape, no batch of candidates and no round is begun.
        max_spill: bytes per thread above which a tile is not timed.
        seed: of the inputs, of the order of candidates and of the turns.
        group: which shapes share finalists.
    """

    family: Family | None = None
    backward: bool = False
    tiles: tuple[str, ...] = ()
    rounds: int = 5
    budget: float = 600.0
    max_spill: int = 64
    seed: int = 0
    group: Group = by_kernel


@dataclass(slots=True, kw_only=True)
class ShapeResult:
    """What was found for one shape: trials, the fastest first, those that were not timed at the end."""

    cell: Shape
    flops: float  # of one call
    spec: AttentionSpec  # with the tile in use
    short_q: bool  # whether the shape's key says so (Extras.short_q)
    cache_rows: int  # over a KV cache, what the shape's key says (Extras.cache_rows); else 0
    trials: list[Trial]
    seconds: float
    complete: bool  # whether the budget lasted for every candidate and round

    @property
    def in_use(self) -> Trial:
        """The trial of the tile that calls take now."""
        return next(trial for trial in self.trials if trial.in_use)


class _Search:
    """One shape's search under way. Inputs are on the card only while it is screened, and again in its final."""

    def __init__(self, cell: Shape, options: Options, watch: Watch) -> None:
        self.cell, self.options, self.watch = cell, options, watch
        self.stand = _stand(cell, options)
        self.spec, self.short_q = self.stand.spec, self.stand.short_q
        self.trials: dict[Tile, Trial] = {}
        self.contestants: dict[Tile, Contestant] = {}
        self.cut_short = False
        self.seconds = 0.0

    def screen(self, tiles: Iterable[Tile], what: str, deadline: float = inf) -> None:
        """Compile, check and time once those that are new."""
        new = [tile for tile in dict.fromkeys(tiles) if tile not in self.trials]
        self.trials |= {tile: Trial(tile=tile, in_use=tile == self.spec.tile) for tile in new}
        for done in range(0, len(new), _COMPILED_AT_ONCE):
            if self._late(deadline):
                for tile in new[done:]:
                    self.trials[tile].refused = "the budget did not last"
                return
            batch = new[done : done + _COMPILED_AT_ONCE]
            self._compile(batch, f"compiling {what}", done, len(new))
            ready = [tile for tile in batch if self.trials[tile].refused is None]
            for n in range(0, len(ready), _SCREENED_AT_ONCE):
                self.watch(f"checking and timing {what}", done + n, len(new))
                self._time(self._enter(ready[n : n + _SCREENED_AT_ONCE]), seed=0)

    def final(self, tiles: Iterable[Tile], deadline: float) -> None:
        """Time ``tiles`` and the one in use in all rounds; of those that the screening left out, what fits is made up for."""
        began = time.perf_counter()
        self.stand = _stand(self.cell, self.options)
        self.contestants.clear()
        chosen = [tile for tile in dict.fromkeys([self.spec.tile, *tiles]) if not misfit(replace(self.spec, tile=tile))]
        self.screen((tile for tile in chosen if tile not in self.trials), "finalists")
        self._enter([tile for tile in chosen if self.trials[tile].refused is None and tile not in self.contestants])
        entered = list(self.contestants)
        rounds: dict[Tile, list[float]] = {tile: [] for tile in entered}
        for n in range(self.options.rounds):
            self.watch("final", n, self.options.rounds)
            if n and self._late(deadline):
                break
            self._time(entered, seed=n, rounds=rounds)
        for tile, times in rounds.items():
            self.trials[tile].rounds, self.trials[tile].finalist = times, True
        self.watch("final", self.options.rounds, self.options.rounds)
        self.leave(began)

    def leave(self, began: float) -> None:
        """Take the inputs off the card."""
        self.contestants.clear()
        self.stand.clear()
        self.seconds += time.perf_counter() - began

    def fastest(self) -> list[Tile]:
        """Tiles near the fastest screening, the fastest first."""
        times = {tile: trial.ms for tile, trial in self.trials.items() if trial.ms is not None}
        ordered = sorted(times, key=times.__getitem__)[:_FASTEST]
        return [tile for tile in ordered if times[tile] <= _NEAR * times[ordered[0]]]

    def result(self) -> ShapeResult:
        """What is known by now."""
        trials = sorted(self.trials.values(), key=lambda trial: (not trial.finalist, trial.ms or inf))
        return ShapeResult(
            cell=self.cell,
            flops=self.cell.backward_flops if self.options.backward and isinstance(self.cell, Cell) else self.cell.flops,
            spec=self.spec,
            short_q=self.short_q,
            cache_rows=self.stand.cache_rows,
            trials=trials,
            seconds=self.seconds,
            complete=not self.cut_short,
        )

    def _compile(self, tiles: Sequence[Tile], what: str, before: int, total: int) -> None:
        counter = itertools.count(before + 1)
        self.watch(what, before, total)
        specs = [replace(self.spec, tile=tile) for tile in tiles]
        made = compile_many(specs, progress=lambda _spec, _made: self.watch(what, next(counter), total))
        for tile, result in zip(tiles, made, strict=True):
            self.trials[tile].note_compiled(result, self.options.max_spill)

    def _enter(self, tiles: Iterable[Tile]) -> list[Tile]:
        """Those that gave the right answer."""
        for tile in tiles:
            entered = self.stand.enter(self.trials[tile])
            if entered is not None:
                self.contestants[tile] = entered
        return [tile for tile in tiles if tile in self.contestants]

    def _time(self, tiles: Sequence[Tile], *, seed: int, rounds: dict[Tile, list[float]] | None = None) -> None:
        """One round; what it gave goes into ``rounds``, None is those of the trials."""
        named = {str(tile): tile for tile in tiles}
        turns = {name: self.contestants[tile] for name, tile in named.items()}
        for name, timing in measure_in_turns(turns, rounds=1, seed=self.options.seed + seed).items():
            times = [ms / self.stand.calls_at_once for ms in timing.rounds]
            (self.trials[named[name]].rounds if rounds is None else rounds[named[name]]).extend(times)

    def _late(self, deadline: float) -> bool:
        late = time.perf_counter() > deadline
        self.cut_short = self.cut_short or late
        return late


def tune_shapes(
    cells: Sequence[Shape], options: Options, watch: Callable[[Shape], Watch], done: Callable[[ShapeResult], None]
) -> tuple[list[ShapeResult], list[str]]:
    """Tune shapes on the current CUDA device, until the budget is spent.

    Args:
        cells: the shapes.
        options: how to search.
        watch: for each shape, what is told how far its search is.
        done: called with each result.

    Returns:
        the results, and the names of the shapes for which the budget did not last.

    Raises:
        DispatchError: no GPU kernel for a shape, the device does not have the family, or no tile matches ``options.tiles``.
        DeviceLostError: a candidate took the device down.
    """
    import torch

    began = time.perf_counter()
    searches: list[_Search] = []
    with torch.no_grad():
        for cell in cells:
            if time.perf_counter() > began + _SCREENING * options.budget:
                break
            searches.append(_screened(cell, options, began + _SCREENING * options.budget, watch(cell)))
        groups: dict[Hashable, list[_Search]] = {}
        for search in searches:
            groups.setdefault(options.group(search.spec, short_q=search.short_q, cache_rows=search.stand.cache_rows), []).append(search)
        for members in groups.values():
            finalists = _finalists(members)
            for search in members:
                search.final(finalists, began + options.budget)
                done(search.result())
    return [search.result() for search in searches], [str(cell) for cell in cells[len(searches) :]]


def _screened(cell: Shape, options: Options, deadline: float, watch: Watch) -> _Search:
    began = time.perf_counter()
    search = _Search(cell, options, watch)
    search.screen([search.spec.tile], "the tile in use")
    search.screen(_first_candidates(search.spec, options, search.stand.cache_rows), "tiles", deadline)
    if not options.tiles:
        search.screen(_other_schedules(search.spec, search.fastest()), "schedules", deadline)
    search.leave(began)
    return search


def _finalists(searches: Sequence[_Search]) -> list[Tile]:
    """The fastest of each shape, and those with the best mean of the time over the shape's fastest."""
    slowness: dict[Tile, list[float]] = {}
    bests: list[Tile] = []
    for search in searches:
        fastest = search.fastest()
        bests += fastest[:1]
        for tile, trial in search.trials.items():
            if trial.ms is not None:
                slowness.setdefault(tile, []).append(trial.ms / (search.trials[fastest[0]].ms or inf))
    mean = {tile: statistics.geometric_mean(each) for tile, each in slowness.items()}
    near = [tile for tile in sorted(mean, key=mean.__getitem__)[:_FASTEST] if mean[tile] <= _NEAR]
    return list(dict.fromkeys([*bests, *near]))


def _first_candidates(spec: AttentionSpec, options: Options, cache_rows: int) -> list[Tile]:
    """Tiles that match a pattern; without patterns, all with the schedule in use. Shuffled, in case the budget does not last.

    Over a KV cache none with more rows than the shape has.
    """
    every = [tile for tile in tiles_that_fit(spec) if not cache_rows or spec.family is Family.FA3 or tile.block_m <= cache_rows]
    if options.tiles:
        chosen = [tile for tile in every if any(fnmatchcase(str(tile), pattern) for pattern in options.tiles)]
    else:
        chosen = [tile for tile in every if all(getattr(tile, name) == getattr(spec.tile, name) for name in SCHEDULES)]
    if not chosen:
        examples = ", ".join(map(str, every[:: max(1, len(every) // 5)]))
        raise DispatchError(
            f"tiles: got {', '.join(options.tiles)}; none of the {len(every)} that fit {spec.kernel_name} matches: {examples}, ..."
        )
    random.Random(options.seed).shuffle(chosen)  # noqa: S311 - an order, not a secret
    # Of two that turn out to be one launch the first is timed: the one that longer calls may tell apart.
    chosen.sort(key=lambda tile: not tile.persistent)
    return chosen


def _other_schedules(spec: AttentionSpec, tiles: Sequence[Tile]) -> Iterator[Tile]:
    axes = {name: values for name, values in spec.AXES.items() if name in SCHEDULES}
    for tile in tiles:
        for values in itertools.product(*axes.values()):
            other = replace(tile, **dict(zip(axes, values, strict=True)))
            if not misfit(replace(spec, tile=other)):
                yield other


def _stand(cell: Shape, options: Options) -> Stand:
    """The shape's inputs on the card, and the kernel that its calls take.

    Raises:
        DispatchError: no GPU kernel, or another family than the one that is asked for.
    """
    device, l2_bytes = _card()
    if isinstance(cell, CacheCell):
        held = make_cache_inputs(cell, device, seed=options.seed)
        key = cache_request(cell, held[0]).dispatch_key()
        spec = _spec_of(cell, key, options)
        return CacheStand(cell, held, spec, short_q=key.extras.short_q, cache_rows=_rows_of(key, spec), clock=clock_of(device))
    sets = make_inputs(cell, device, l2_bytes=l2_bytes, seed=options.seed, dout=options.backward)
    if options.backward:
        key = backward_request_of(cell, sets[0]).dispatch_key()
        return BackwardStand(cell, sets, _spec_of(cell, key, options), short_q=key.extras.short_q)
    problem = request_of(cell, sets[0], options.family).problem
    key = key_of_problem(problem, best_arch(problem.q.device), None, options.family, may_split=False)  # a tile is of the whole kernel
    spec = _spec_of(cell, key, options)
    return ForwardStand(cell, sets, spec, short_q=key.extras.short_q, cache_rows=_rows_of(key, spec))


def _rows_of(key: DispatchKey, spec: AttentionSpec) -> int:
    """Rows that a tile is chosen for, 0 where it is the tile of any number."""
    if isinstance(spec, Fa2KvCacheSpec):
        return key.extras.cache_rows
    return WARPGROUP_ROWS if key.extras.few_rows and key.family is Family.FA3 else 0


def _spec_of(cell: Shape, key: DispatchKey, options: Options) -> AttentionSpec:
    spec = lookup(key)
    if not isinstance(spec, AttentionSpec) or (options.family is not None and spec.family is not options.family):
        wanted = "a GPU kernel" if options.family is None else options.family.value
        raise DispatchError(f"family: got {wanted} for {cell}, which resolves to {spec.kernel_name} here; leave --family out")
    return spec


def _card() -> tuple[torch.device, int]:
    """The current device and the bytes of its L2 cache."""
    import torch

    index = torch.cuda.current_device()
    return torch.device("cuda", index), torch.cuda.get_device_properties(index).L2_cache_size
