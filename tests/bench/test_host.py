from __future__ import annotations

from atomr_accel_flashattn.bench.host import startup


def test_startup_times_are_measured_without_a_card() -> None:
    lines: list[str] = []
    found = startup(lines.append)
    assert found.keys() == {"import_s", "first_compile_s", "cold_compile_s", "cache_hit_ms"}
    assert 0 < found["cache_hit_ms"] < 1e3 * found["cold_compile_s"]
    assert len(lines) == 1
