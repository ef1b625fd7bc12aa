"""The schedule of a StepPlan: what its kernel writes against a model in plain Python, and that the blocks' parts are all of the keys."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.kernels.step import ScheduledKvCacheSpec, StepParams, StepScheduleSpec, schedule_bytes
from atomr_accel_flashattn.problem import Band, StepShape
from atomr_accel_flashattn.types import Device, DType, SmArch
from tests.cases import Alibi, Case
from tests.check import check_case

from .build import compiler, load
from .running_kvcache import Cached, launch

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++20 compiler")

UNIT_COST = 4  # kUnitCost of step_schedule.cuh
TILE = Tile(block_m=16, block_n=32, warps=4, stages=2)

# The pieces of block w, as step_kvcache.cuh walks along them: row block, KV head, first and last tile, partial result.
WALK = """
#include "attention/step_schedule.cuh"
extern "C" int walk(const void* params, int w, int* out) {
  const auto& p = *static_cast<const fa::StepParams*>(params);
  const fa::StepSchedule line(p);
  const fa::StepSchedule::Head head = *line.head;
  if (w >= head.blocks) return 0;
  const int64_t begin = fa::begin_of(head, w), end = fa::begin_of(head, w + 1);
  int count = 0;
  for (fa::Unit unit(line, p.cache.fwd.work_heads, w);; unit.next()) {
    const fa::UnitPiece piece = unit.between(begin, end);
    if (piece.first < piece.end) {
      const bool whole = piece.first == 0 && piece.end == unit.tiles();
      const int found[] = {unit.row_block, unit.head, piece.first, piece.end, whole ? -1 : fa::part_of_block(w, piece)};
      for (int x : found) *out++ = x;
      ++count;
    }
    if (unit.end() >= end) return count;
  }
}
"""


@dataclass(frozen=True)
class Step:
    """Lengths of q and k of a packed call, and how it is cut."""

    lengths_q: NDArray[np.int32]
    lengths_k: NDArray[np.int32]
    heads: int
    heads_kv: int
    band: Band
    blocks: int

    @property
    def ratio(self) -> int:
        return self.heads // self.heads_kv

    def row_blocks(self) -> int:
        """Of a sequence."""
        return -(-max(1, int(self.lengths_q.max(initial=0)) * self.ratio) // TILE.block_m)

    def tiles(self) -> NDArray[np.int64]:
        """(sequences, row blocks): tiles that hold a key which one of the rows sees; -1 without rows."""
        counts = np.full((len(self.lengths_q), self.row_blocks()), -1)
        for b, (n, keys) in enumerate(zip(self.lengths_q, self.lengths_k, strict=True)):
            j = np.arange(keys)
            for m in range(-(-n * self.ratio // TILE.block_m)):
                queries = np.unique(np.arange(m * TILE.block_m, min((m + 1) * TILE.block_m, n * self.ratio)) // self.ratio)
                p = (queries + keys - n)[:, None]
                seen = np.ones((len(queries), keys), bool)
                if self.band.right is not None:
                    seen &= j <= p + self.band.right
                if self.band.left is not None:
                    window = seen & (j >= p - self.band.left)
                    seen &= (j >= p - self.band.left) | (j < self.band.sink_tokens)
                else:
                    window = seen
                # Between the first and the last row, and up to the last sink token, nothing is left out.
                whole = (
                    {*range(first // TILE.block_n, last // TILE.block_n + 1)}
                    if (first := _first(window)) <= (last := _last(window))
                    else set()
                )
                counts[b, m] = len(whole | set((np.flatnonzero(seen.any(axis=0)) // TILE.block_n).tolist()))
        return counts

    def params(self, schedule: NDArray[np.uint8] | None = None) -> tuple[Any, dict[str, Any], StepScheduleSpec]:
        """Parameters of the kernel, the arrays that it reads, and itself."""
        shape = StepShape(
            device=Device("cuda", 0),
            batch=len(self.lengths_q),
            heads=self.heads,
            heads_kv=self.heads_kv,
            head_dim=64,
            v_head_dim=64,
            seqlen_q=int(self.lengths_q.max(initial=0)),
            packed_q=True,
            band=self.band,
            capacity=1 << 20,
            new_tokens=0,
            left_pad=False,
        )
        spec = ScheduledKvCacheSpec(
            arch=SmArch.SM_90,
            dtype=DType.F16,
            head_dim=64,
            v_head_dim=64,
            tile=TILE,
            left_bound=self.band.left is not None,
            right_bound=self.band.right is not None,
            sink_tokens=self.band.sink_tokens > 0,
            varlen=True,
        )
        before = StepScheduleSpec.before(spec)
        arrays = {"cache_lengths": self.lengths_k, "cu_seqlens_q": np.cumsum([0, *self.lengths_q]).astype(np.int32), "schedule": schedule}
        return before.pack_shape(shape, spec, self.blocks), arrays, before

    def made(self) -> NDArray[np.uint8]:
        """What the kernel writes."""
        schedule = np.full(schedule_bytes(len(self.lengths_q), self.row_blocks(), self.blocks), 0xA5, np.uint8)
        params, arrays, spec = self.params(schedule)
        launch(spec, params, arrays, 1, seed=self.blocks)
        return schedule


def _first(seen: NDArray[np.bool_]) -> int:
    found = np.flatnonzero(seen.any(axis=0))
    return int(found[0]) if found.size else 1


def _last(seen: NDArray[np.bool_]) -> int:
    found = np.flatnonzero(seen.any(axis=0))
    return int(found[-1]) if found.size else 0


def model(tiles: NDArray[np.int64], heads_kv: int, blocks: int) -> dict[str, Any]:
    """The schedule of so many tiles, in plain Python."""
    flat = tiles.reshape(-1)
    busy, idle = np.flatnonzero(flat > 0), np.flatnonzero(flat == 0)
    costs = (flat[busy] + UNIT_COST) * heads_kv
    begin = np.concatenate([[0], np.cumsum(costs)])
    total, units = int(begin[-1]), len(busy) * heads_kv
    least = 256 // TILE.block_n
    parts = min(blocks, max(units, -(-total // least)))
    places = [w * (total // parts) + min(w, total % parts) for w in range(parts)] if parts else []
    first = [int(np.searchsorted(begin[:-1], place, side="right")) - 1 for place in places]
    return {"begin": begin, "busy": busy, "idle": idle, "parts": parts, "first": first}


def read(schedule: NDArray[np.uint8], row_blocks: int, blocks: int) -> dict[str, Any]:
    """The same of what the kernel wrote."""
    _longer, parts, busy, idle = schedule[8:24].view(np.int32)
    starts, rest = schedule[32 : 32 + 32 * blocks].view(np.int32).reshape(blocks, 8), schedule[32 + 32 * blocks :]
    begin, order = rest[: 8 * (row_blocks + 1)].view(np.int64), rest[8 * (row_blocks + 1) :].view(np.int32)
    first = starts[:, 4]
    return {
        "begin": begin[: busy + 1],
        "busy": order[:busy],
        "idle": order[row_blocks - idle :][::-1],
        "parts": parts,
        "first": first[:parts].tolist(),
    }


def shared_units(found: dict[str, Any], heads_kv: int) -> int:
    """Places where a part begins behind the first tile of a unit."""
    begin, total, parts = found["begin"], int(found["begin"][-1]), found["parts"]
    inside = 0
    for w, entry in enumerate(found["first"]):
        place, cost = w * (total // parts) + min(w, total % parts) - begin[entry], (begin[entry + 1] - begin[entry]) // heads_kv
        inside += place % cost > UNIT_COST
    return inside


def random_step(blocks: int) -> Step:
    """Lengths 0 to 5000, or one long among many empty ones; every mask and ratio in turn."""
    random = np.random.default_rng(blocks)
    batch = int(random.integers(1, 24))
    lengths_k = random.integers(1, 5001, batch).astype(np.int32)
    lengths_k[random.random(batch) < 0.3] = 0
    if blocks % 5 == 0:
        lengths_k = np.zeros(300, np.int32)
        lengths_k[random.integers(300)] = 5000
    lengths_q = (np.ones_like(lengths_k), random.integers(0, 20, len(lengths_k)).astype(np.int32))[blocks % 2]
    band = (Band(), Band(None, 0), Band(100, 0), Band(700, 0, 40), Band(30, 2, 3))[blocks // 2 % 5]
    ratio = (1, 4, 5, 8)[blocks % 4]
    heads_kv = int(random.integers(1, 9))
    return Step(lengths_q, lengths_k, ratio * heads_kv, heads_kv, band, blocks)


@pytest.mark.parametrize("blocks", [1, 2, 5, *range(40, 161, 7)])
def test_every_tile_is_that_of_one_block(blocks: int):
    step = random_step(blocks)
    tiles = step.tiles()
    made = step.made()
    expected, found = model(tiles, step.heads_kv, blocks), read(made, tiles.size, blocks)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    params, arrays, _ = step.params(made)
    (ctypes.c_uint64 * len(StepParams.SLOTS)).from_buffer(params)[0] = arrays["schedule"].ctypes.data
    library, room = load(WALK), np.zeros((step.heads_kv * tiles.size, 5), np.int32)
    times = {(at, head): np.zeros(tiles.flat[at], np.int32) for at in expected["busy"] for head in range(step.heads_kv)}
    parts: list[int] = []
    work = []
    for w in range(blocks):
        count = library.walk(ctypes.byref(params), w, ctypes.c_void_p(room.ctypes.data))
        for at, head, first, end, part in room[:count]:
            times[at, head][first:end] += 1
            parts += [part] if part >= 0 else []
            assert (part < 0) == (end - first == tiles.flat[at])
        work.append(int((room[:count, 3] - room[:count, 2]).sum()) + UNIT_COST * count)
    assert all((each == 1).all() for each in times.values())
    assert len(set(parts)) == len(parts)
    assert all(0 <= part < 2 * blocks for part in parts)
    if expected["parts"]:
        share = expected["begin"][-1] / expected["parts"]
        assert max(work) <= share + 1 + UNIT_COST, "a block has more than its share, and what it costs to continue a unit"


def test_a_step_without_keys_has_no_parts():
    step = Step(np.ones(3, np.int32), np.zeros(3, np.int32), 4, 4, Band(None, 0), 9)
    found = read(step.made(), 3, 9)
    assert found["parts"] == 0
    assert found["idle"].tolist() == [0, 1, 2]


def test_numbers_of_a_line_exceed_32_bits():
    """2^16 sequences of 2^20 keys, 64 heads: 2^37 tiles."""
    step = Step(np.ones(1 << 16, np.int32), np.full(1 << 16, 1 << 20, np.int32), 64, 64, Band(), 128)
    found = read(step.made(), 1 << 16, 128)
    assert found["begin"][-1] == (1 << 16) * 64 * ((1 << 15) + UNIT_COST)
    assert found["first"] == list(range(0, 1 << 16, 1 << 9))


LENGTHS = {"lengths_q": (1, 1, 1, 1, 1, 1), "lengths_k": (0, 700, 0, 33, 1, 250)}
QUERIES = {"lengths_q": (2, 0, 9, 40), "lengths_k": (600, 50, 0, 400)}
STEPS: list[tuple[int, dict[str, Any]]] = [
    (3, LENGTHS | {"heads": 4, "heads_kv": 1, "right": 0}),
    (8, LENGTHS | {"heads": 5, "heads_kv": 5, "learned_sink": True}),
    (13, LENGTHS | {"heads": 5, "heads_kv": 1, "left": 300, "right": 0, "sink_tokens": 70}),
    (21, LENGTHS | {"heads": 8, "heads_kv": 1, "softcap": 3.0, "learned_sink": True, "right": 0}),
    (33, LENGTHS | {"heads": 16, "heads_kv": 4, "alibi": Alibi.BATCH, "head_dim": 40, "v_head_dim": 24}),
    (17, QUERIES | {"heads": 4, "heads_kv": 1, "right": 0, "learned_sink": True}),
    (40, QUERIES | {"heads": 6, "heads_kv": 2, "left": 200, "right": 1, "sink_tokens": 5, "learned_sink": True}),
]


@pytest.mark.parametrize(("blocks", "call"), STEPS, ids=[str(blocks) for blocks, _ in STEPS])
def test_parts_of_blocks_make_the_whole(blocks: int, call: dict[str, Any]):
    """Against the oracle, and within its rounding equal to the kernel whose blocks share nothing."""
    case = Case(dtype=(DType.F16, DType.BF16)[blocks % 2], **call)
    made: list[Any] = []
    for way in (Cached(blocks=blocks, seed=blocks), Cached(seed=blocks)):
        check_case(case, lambda inputs, way=way: made.append(way(inputs)) or made[-1])
    scheduled, alone = made
    np.testing.assert_allclose(scheduled.out.astype(np.float32), alone.out.astype(np.float32), rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(scheduled.lse, alone.lse, atol=1e-3)
    band = Band(case.left, case.right, case.sink_tokens)
    step = Step(np.array(case.lengths_q, np.int32), np.array(case.lengths_k, np.int32), case.heads, case.heads_kv, band, blocks)
    assert shared_units(model(step.tiles(), case.heads_kv, blocks), case.heads_kv) > 0, "the blocks share nothing"


def test_equal_schedules_give_equal_bits():
    case = Case(dtype=DType.F16, **LENGTHS, heads=4, heads_kv=1, right=0)
    made: list[Any] = []
    for seed in (2, 4):
        check_case(case, lambda inputs, seed=seed: made.append(replace(Cached(block_size=None, blocks=7), seed=seed)(inputs)) or made[-1])
    np.testing.assert_array_equal(made[0].out, made[1].out)
