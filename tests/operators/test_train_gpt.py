"""examples/train_gpt.py: both runs agree, Ctrl-C loses nothing, and it compiles into one graph."""

from __future__ import annotations

import functools
import json
import runpy
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

import atomr_accel_flashattn as fa  # noqa: E402 - after the skip

SMALL = {"device": "cpu", "layers": 1, "width": 32, "heads": 4, "heads-kv": 2, "length": 24, "batch": 3, "window": 9, "steps": 14}
TEXT = "She sells sea shells by the sea shore.\n" * 100  # its own are the pages, which change


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products of this size are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def example() -> Callable[..., int]:
    """Its command with a small model."""
    module = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "train_gpt.py"))
    main: Callable[..., int] = module["main"]
    main.__globals__["text"] = lambda: TEXT
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    return lambda *options: main([*small, *map(str, options)])


def curves(path: Path) -> dict[str, list[float]]:
    return {name: run["losses"] for name, run in json.loads(path.read_text(encoding="utf-8"))["runs"].items()}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_a_run_that_was_interrupted_is_one_that_was_not(
    packed: bool, example: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Ctrl-C comes amid a forward, in the second turn."""
    options = ["--packed"] if packed else []
    name = "flash_attn_varlen_func" if packed else "flash_attn_func"
    call, calls = getattr(fa, name), []

    def interrupting(*arguments: Any, **named: Any) -> Any:
        calls.append(named)
        if len(calls) == 12:
            signal.raise_signal(signal.SIGINT)
        return call(*arguments, **named)

    checkpoint = ["--checkpoint", tmp_path / "run.pt"]
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(fa, name, interrupting)
        assert example(*options, *checkpoint) == 130
    assert signal.getsignal(signal.SIGINT) is before
    kept = {name: len(run["losses"]) for name, run in torch.load(tmp_path / "run.pt", weights_only=True)["runs"].items()}
    assert kept["flash"] == 12, "the step that it came amid is kept"
    assert example(*options, *checkpoint, "--out", tmp_path / "resumed.json") == 0
    assert example(*options, "--out", tmp_path / "whole.json") == 0
    assert "they agree" in capsys.readouterr().out
    resumed, whole = curves(tmp_path / "resumed.json"), curves(tmp_path / "whole.json")
    assert resumed == whole
    assert [len(losses) for losses in whole.values()] == [14, 14]
    assert all(losses[-1] < losses[0] - 0.2 for losses in whole.values()), "nothing was learned"
    assert whole["flash"] != whole["sdpa"], "two patterns of dropout"
    assert (tmp_path / "whole.png").exists() == bool(find_spec("matplotlib"))
    if find_spec("matplotlib"):
        kept = [tmp_path / "resumed.json", tmp_path / "whole.json"]
        assert example("--draw", *kept, "--out", tmp_path / "both.png") == 0
        assert (tmp_path / "both.png").stat().st_size > (tmp_path / "whole.png").stat().st_size
    with pytest.raises(SystemExit, match="--out: got none with --draw"):
        example("--draw", tmp_path / "whole.json")
    with pytest.raises(SystemExit, match=r"--checkpoint: got .*run.pt"):
        example(*options, *checkpoint, "--seed", 1)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("window", [9, -1])
def test_without_dropout_both_runs_are_one(packed: bool, window: int, example: Callable[..., int], tmp_path: Path):
    options = ["--dropout", 0, "--window", window, "--layers", 2, "--steps", 2, *(["--packed"] if packed else [])]
    assert example(*options, "--out", tmp_path / "out.json") == 0
    ours, theirs = curves(tmp_path / "out.json").values()
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_it_compiles_into_one_graph(packed: bool, example: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a backend that generates no code, which takes a minute."""
    options = ["--steps", 2, "--out", tmp_path / "out.json", *(["--packed"] if packed else [])]
    assert example(*options) == 0
    eager = curves(tmp_path / "out.json")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert example(*options, "--compile") == 0
    torch._dynamo.reset()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for each run"
    for name, losses in curves(tmp_path / "out.json").items():
        assert losses == pytest.approx(eager[name], rel=1e-5)


def test_losses_that_differ_are_said(example: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(fa, "flash_attn_func", lambda q, *_arguments, **_named: 100 * q)
    assert example("--steps", 8) == 1
    assert "more than 1%" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--packed"], ["--compile"], ["--packed", "--compile"], ["--window", -1]], ids=str)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of Inductor
def test_on_a_card(options: list[Any], example: Callable[..., int], tmp_path: Path):
    torch._dynamo.reset()
    size = ["--device", "cuda", "--layers", 2, "--width", 128, "--length", 256, "--batch", 8, "--steps", 60]
    assert example(*size, *options, "--out", tmp_path / "out.json") == 0
    runs = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["runs"]
    assert all(run["peak_bytes"] > 0 and run["losses"][-1] < run["losses"][0] - 0.5 for run in runs.values())
