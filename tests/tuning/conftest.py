"""A card to tune on: kernels that the CPU backend computes, and times that follow from the tile."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.bench import cache_inputs as bench_cache_inputs, inputs as bench_inputs  # noqa: E402
from atomr_accel_flashattn.bench.cache_cells import CacheCell  # noqa: E402
from atomr_accel_flashattn.bench.cache_inputs import CacheInputs  # noqa: E402
from atomr_accel_flashattn.bench.cells import Cell  # noqa: E402
from atomr_accel_flashattn.bench.inputs import Inputs  # noqa: E402
from atomr_accel_flashattn.bench.timing import Contestant, Timing  # noqa: E402
from atomr_accel_flashattn.dispatch import forget_lookups  # noqa: E402
from atomr_accel_flashattn.env import settings  # noqa: E402
from atomr_accel_flashattn.errors import CompileError  # noqa: E402
from atomr_accel_flashattn.jit.compile import CompiledKernel  # noqa: E402
from atomr_accel_flashattn.kernels.bwd_postprocess import BackwardPostprocessSpec  # noqa: E402
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec  # noqa: E402
from atomr_accel_flashattn.kernels.fa3_fp8 import Fa3Fp8FwdParams  # noqa: E402
from atomr_accel_flashattn.kernels.forward import ForwardSpec  # noqa: E402
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Tile  # noqa: E402
from atomr_accel_flashattn.launch.driver import DeviceProperties  # noqa: E402
from atomr_accel_flashattn.tiles import saved as saved_tiles  # noqa: E402
from atomr_accel_flashattn.torch_ops import repeat  # noqa: E402
from atomr_accel_flashattn.tuning import search, trial  # noqa: E402
from atomr_accel_flashattn.types import SmArch  # noqa: E402
from tests.cli.conftest import ask, invoke  # noqa: E402, F401 - fixtures
from tests.fakes.gpu import STREAM, FakeGpu  # noqa: E402
from tests.fakes.tensors import fake  # noqa: E402

InputsT = TypeVar("InputsT", Inputs, CacheInputs)


def _ms(tile: Tile) -> float:
    """The fastest has 48 keys a step and persistent blocks."""
    return 1.0 + abs(tile.block_n - 48) / 100 + (0.0 if tile.persistent else 0.02) + tile.stages * 1e-3 + tile.block_m * 1e-6


@dataclass
class Card(FakeGpu):
    """A fake GPU on which tiles can be wrong, silent, spilling or no kernel at all, and have times."""

    wrong: Callable[[Tile], bool] = lambda _tile: False
    silent: Callable[[Tile], bool] = lambda _tile: False
    spills: Callable[[Tile], int] = lambda _tile: 0
    fails: Callable[[Tile], bool] = lambda _tile: False
    ms: Callable[[Tile], float] = _ms
    compiled: list[ForwardSpec] = field(default_factory=list)
    turns: list[tuple[str, ...]] = field(default_factory=list)

    def on_launch(self, *arguments: Any) -> int:
        code = super().on_launch(*arguments)
        spec, p = self.launches[-1][:2]
        p = p.fwd if isinstance(p, Fa3Fp8FwdParams) else p
        if isinstance(spec, (ForwardSpec, BackwardPostprocessSpec)):  # which write o and dq
            fwd, answer, dim = (p, p.o, p.v_head_dim) if isinstance(spec, ForwardSpec) else (p.fwd, p.dq, p.fwd.head_dim)
            tile = self.last_tile
            if self.silent(tile) or self.wrong(tile):  # NaN, as before the launch, or zeros, in the first sequence
                ctypes.memset(answer, 0xFF if self.silent(tile) else 0, fwd.seqlen_q * fwd.heads * dim * 2)
        return code

    @property
    def last_tile(self) -> Tile:
        """That of the last call: a backward has kernels around the one that is tuned."""
        return next(spec.tile for spec, *_ in reversed(self.launches) if isinstance(spec, (ForwardSpec, Fa2BackwardSpec, Fa2KvCacheSpec)))

    def compile_many(
        self, specs: Iterable[ForwardSpec], progress: Callable[[ForwardSpec, Any], None]
    ) -> list[CompiledKernel | CompileError]:
        """Stands in for the function of that name."""
        made = [self._compile(spec) for spec in specs]
        for result in made:
            progress(result.spec, result)  # type: ignore[arg-type]
        return made

    def _compile(self, spec: ForwardSpec) -> CompiledKernel | CompileError:
        self.compiled.append(spec)
        if self.fails(spec.tile):
            return CompileError("ptxas gave up", spec=spec)
        numbers: dict[str, Any] = {"registers": 168, "shared_bytes": 0, "seconds": 0.0, "compile_seconds": 0.0}
        spilled = self.spills(spec.tile)
        return CompiledKernel(spec=spec, cubin=b"", spill_bytes=spilled, cache_hit=False, log="", **numbers)

    def measure(self, contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
        """Stands in for ``measure_in_turns``: runs every contestant once, and tells the time of its tile."""
        del seed
        self.turns.append(tuple(contestants))
        found = {}
        for name, contestant in contestants.items():
            for call in contestant.calls:
                call()
            found[name] = Timing([self.ms(self.last_tile)] * rounds)
        return found


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """This machine has a :class:`Card` without wgmma, and an empty cache folder. Any shape has more tiles than its one multiprocessor."""
    made = Card(DeviceProperties("Fake", (8, 0), 1, 1 << 30))
    made.install(monkeypatch, SmArch.SM_80)
    monkeypatch.setenv("ATOMR_FLASHATTN_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: STREAM, raising=False)
    monkeypatch.setattr(saved_tiles, "device_count", lambda: 1)
    monkeypatch.setattr(saved_tiles, "device_properties", lambda _index: made.properties)
    monkeypatch.setattr(search, "_card", lambda: (torch.device("cpu"), 0))
    monkeypatch.setattr(search, "compile_many", made.compile_many)
    monkeypatch.setattr(search, "measure_in_turns", made.measure)
    monkeypatch.setattr(search, "make_inputs", _fake_inputs)
    monkeypatch.setattr(search, "make_cache_inputs", _fake_cache_inputs)
    monkeypatch.setattr(trial, "check_rows", _check_plain)
    monkeypatch.setattr(trial, "check_cache_rows", _check_plain_cache)
    monkeypatch.setattr(trial, "check_gradients", _check_plain_gradients)
    settings.cache_clear()
    forget_lookups()
    repeat.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # shapes are so small that threads only wait for each other
    yield made
    torch.set_num_threads(threads)
    monkeypatch.undo()
    settings.cache_clear()
    forget_lookups()
    repeat.clear()


@pytest.fixture
def hopper(card: Card, monkeypatch: pytest.MonkeyPatch) -> Card:
    """The same with wgmma, and more multiprocessors than most shapes have tiles."""
    card.properties = FakeGpu().properties
    card.install(monkeypatch, SmArch.SM_90A)
    return card


def _fake_inputs(cell: Cell, device: Any, **options: Any) -> Sequence[Inputs]:
    return [_converted(each, fake) for each in bench_inputs.make_inputs(cell, device, **options)]


def _check_plain(cell: Cell, inputs: Inputs, out: Any) -> float:
    """The real check, in which this torch makes no tensors on the fake card."""
    plain = _converted(inputs, lambda tensor: tensor.as_subclass(torch.Tensor))
    return bench_inputs.check_rows(cell, plain, out.as_subclass(torch.Tensor))


def _check_plain_gradients(cell: Cell, inputs: Inputs, gradients: Sequence[Any]) -> float:
    plain = _converted(inputs, lambda tensor: tensor.as_subclass(torch.Tensor))
    return bench_inputs.check_gradients(cell, plain, [each.as_subclass(torch.Tensor) for each in gradients])


def _fake_cache_inputs(cell: CacheCell, device: Any, *, seed: int) -> Sequence[CacheInputs]:
    return [_converted(each, fake) for each in bench_cache_inputs.make_cache_inputs(cell, device, reuse_bytes=2 * cell.kv_bytes, seed=seed)]


def _check_plain_cache(cell: CacheCell, inputs: CacheInputs, out: Any) -> float:
    plain = _converted(inputs, lambda tensor: tensor.as_subclass(torch.Tensor))
    return bench_cache_inputs.check_cache_rows(cell, plain, out.as_subclass(torch.Tensor))


def _converted(inputs: InputsT, change: Callable[[Any], Any]) -> InputsT:
    tensors = {each.name: change(x) for each in fields(inputs) if torch.is_tensor(x := getattr(inputs, each.name))}
    return replace(inputs, **tensors)
