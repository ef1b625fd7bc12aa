"""The benchmark of a compiled layer on the CPU: a small one, real graphs and gradients, and times that are made up."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.bench import entry, layer  # noqa: E402 - after the skip
from atomr_accel_flashattn.bench.layer import LayerOptions, run_layer  # noqa: E402
from atomr_accel_flashattn.bench.timing import Contestant, Timing  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]

SIZES = {"hidden": 64, "heads": 4, "heads_kv": 2, "mlp": 96, "batch": 2, "tokens": 40}
SMALL: dict[str, Any] = SIZES | {"dtype": "float32", "device": "cpu", "backend": "aot_eager"}


@pytest.fixture(autouse=True)
def without_a_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Steps run, twice as long each time; their memory is theirs by name."""

    def in_turns(contestants: Mapping[str, Contestant], *, rounds: int, seed: int) -> dict[str, Timing]:
        assert rounds >= 5, "fewer rounds than a record wants"
        for contestant in contestants.values():
            with contestant.context():
                for call in contestant.calls:
                    call()
        return {name: Timing([2.0 ** (n + seed)] * rounds) for n, name in enumerate(sorted(contestants))}

    monkeypatch.setattr(layer, "measure_in_turns", in_turns)
    monkeypatch.setattr(layer, "peak_bytes", lambda call: len(call()))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_both_layers_compute_the_same_and_the_record_says_so(tmp_path: Path) -> None:
    torch._dynamo.utils.counters.clear()
    lines: list[str] = []
    _, path = entry.main_layer(LayerOptions(**SMALL), out=tmp_path, say=lines.append)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for each peer"
    assert not torch._dynamo.utils.counters["graph_break"]
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["kind"] == "layer"
    assert record["failures"] == {}
    assert record["layer"]["tokens"] == 40
    assert max(record["error"]["ours"].values()) < 1e-4
    assert record["ratio"] == {"fa2": 1.0, "ours": 0.5}
    assert record["peak_bytes"] == {"fa2": 8, "ours": 8}, "o, and the gradients of x and six weights"
    assert [len(each["rounds"]) for each in record["step_ms"].values()] == [9, 9]
    assert any("ours" in line and "speed 0.500 x fa2" in line for line in lines)


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "_ours", layer.flash_attn_func)
    body = run_layer(LayerOptions(**SMALL), lambda _line: None)
    assert "differs from fa2" in body["failures"]["ours"]
    assert body["step_ms"].keys() == {"fa2"}


def test_a_peer_that_raises_is_a_failure_and_unknown_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    body = run_layer(LayerOptions(**SMALL | {"peers": ("ours", "cudnn"), "backend": "eager"}), lambda _line: None)
    assert body["failures"].keys() == {"cudnn"}, "there is no cuDNN on a CPU"
    with pytest.raises(ValueError, match=r"flex; allowed are ours, fa2, cudnn"):
        run_layer(LayerOptions(**SMALL | {"peers": ("ours", "flex")}), lambda _line: None)
