from __future__ import annotations

import re
from pathlib import Path

import pytest

from atomr_accel_flashattn.cli.gpu_record import record_text, summarised
from atomr_accel_flashattn.cli.matrix import END_MARK, START_MARK, Runs, collapsed, markdown, rendered_readme, support_matrix
from atomr_accel_flashattn.dispatch import DISPATCH_TABLE, FEATURES
from atomr_accel_flashattn.errors import CacheError
from atomr_accel_flashattn.limits import NOT_BUILT
from atomr_accel_flashattn.types import DType, SmArch
from tests.cli.conftest import Ask, Invoke


def write_record(path: Path, *tests: str, failed: int = 0, device: str = "NVIDIA H100 80GB HBM3") -> Path:
    outcomes = [*((test, "passed") for test in tests), *((f"broken[{number}]", "failed") for number in range(failed))]
    summary = summarised({"test": test, "outcome": outcome, "seconds": 1.0} for test, outcome in outcomes)
    card = {"name": device, "compute_capability": "9.0"}
    path.write_text(record_text({"commit": "abc1234", "device": card} | summary))
    return path


def states(record: Path | None = None, arch: str = "sm_90") -> dict[str, str]:
    table = support_matrix(record)
    return {name: entries[table.archs.index(arch)].text for name, entries in table.rows.items()}


def test_every_type_and_feature_has_a_row_with_a_cell_per_arch() -> None:
    table = support_matrix()
    assert len(table.rows) == len(DType) + len(FEATURES)
    assert all(len(entries) == len(SmArch) for entries in table.rows.values())


def test_cells_say_what_dispatch_says() -> None:
    table = support_matrix()
    by_feature = list(table.rows.values())[len(DType) :]
    for feature, entries in zip(FEATURES, by_feature, strict=True):
        for arch, entry in zip(SmArch, entries, strict=True):
            assert (entry.state != "refused") == DISPATCH_TABLE.cell(arch, DType.F16, 128, [feature]).built


def test_refusals_give_their_reason(invoke: Invoke) -> None:
    result = invoke("matrix")
    assert result.exit_code == 0
    assert "which has no fp8" in " ".join(result.stdout.split())
    assert "family: " in result.stdout


def test_matrix_json(ask: Ask) -> None:
    table = ask("matrix")
    assert table["rows"]["causal"][table["archs"].index("sm_80")] == {"state": "compiles", "text": "compiles", "reason": ""}


def test_nothing_is_said_to_have_run_without_a_record() -> None:
    assert "ran" not in {text.split()[0] for text in states().values()}


def test_a_record_names_the_card_for_what_its_tests_named(tmp_path: Path) -> None:
    record = write_record(tmp_path / "gpu_tests.json", "test_grid.py::test[bf16-b1-q70-k90-h8kv2-d64-causal-alibi]")
    found = states(record)
    assert found["bf16"] == found["causal"] == found["ALiBi"] == found["MQA / GQA at any ratio"] == "ran on H100"
    assert found["f16"] == found["softcap"] == found["full"] == "compiles"
    assert states(record, "sm_80")["bf16"] == "compiles"


def test_the_table_says_which_commit_ran(tmp_path: Path) -> None:
    record = write_record(tmp_path / "gpu_tests.json", "bf16")
    assert "What ran on a card is commit abc1234." in markdown(support_matrix(record))
    assert "What ran" not in markdown(support_matrix())


def test_a_run_with_a_failure_counts_for_nothing(tmp_path: Path) -> None:
    assert states(write_record(tmp_path / "gpu_tests.json", "bf16", failed=1))["bf16"] == "compiles"


@pytest.mark.parametrize(
    ("device", "short"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S PCIe", "L40S"),
    ],
)
def test_cards_have_short_names(tmp_path: Path, device: str, short: str) -> None:
    assert Runs.read(write_record(tmp_path / "gpu_tests.json", device=device)).card == short


def test_the_wgmma_family_runs_on_hopper_and_counts_for_sm_90a_alone(tmp_path: Path) -> None:
    tests = "test_grid.py::test[fa2-bf16-b1-causal]", "test_grid.py::test[fa3-f16-b1-causal-alibi]"
    record = write_record(tmp_path / "gpu_tests.json", *tests)
    mma, wgmma = states(record), states(record, "sm_90a")
    assert (mma["bf16"], mma["ALiBi"]) == ("ran on H100", "compiles")
    assert (wgmma["bf16"], wgmma["ALiBi"], wgmma["wgmma family (FA3)"]) == ("compiles", "ran on H100", "ran on H100")


def test_gradients_on_hopper_are_those_of_the_mma_sync_family(tmp_path: Path) -> None:
    assert all(states(arch=arch)["backward"] == "compiles" for arch in ("sm_80", "sm_90", "sm_90a", "sm_120"))
    assert states(arch="cpu")["deterministic backward"] == "runs"
    record = write_record(tmp_path / "gpu_tests.json", "test_backward.py::test[bf16-b1-causal]")
    assert states(record)["backward"] == states(record, "sm_90a")["backward"] == "ran on H100"
    assert states(record, "sm_80")["backward"] == "compiles"


def test_the_deterministic_backward_is_refused_as_long_as_it_is_not_built() -> None:
    assert states()["deterministic backward"] == ("refused" if "deterministic" in NOT_BUILT else "compiles")


def test_short_sequences_at_the_head_dim_of_the_matrix_count_for_their_tile(tmp_path: Path) -> None:
    said = {"q70-k90-h8kv2-d128": "ran on H100", "q70-k90-h8kv2-d64": "compiles", "q4096-k90-h8kv2-d128": "compiles"}
    for test, text in said.items():
        record = write_record(tmp_path / f"{test}.json", f"test_grid.py::test[fa3-bf16-b1-{test}-causal]")
        assert states(record, "sm_90a")["short sequences of q (own tile)"] == text


def test_the_records_of_a_folder_count_together(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"got a folder without a gpu_tests\*.json"):
        Runs.read(tmp_path)
    write_record(tmp_path / "gpu_tests.json", "softcap", "alibi")
    write_record(tmp_path / "gpu_tests_fp8.json", "alibi", "test_fa3_fp8.py::test[e4m3-e4m3-e4m3-bf16-head]")
    write_record(tmp_path / "gpu_tests_red.json", "dropout", failed=1)
    assert Runs.read(tmp_path).passed == {"fa2": {"softcap": 1, "alibi": 2}, "fa3": {"bf16": 1, "e4m3": 1, "fa3": 1}}
    write_record(tmp_path / "gpu_tests_other.json", "causal", device="NVIDIA L40S")
    with pytest.raises(CacheError, match=r"got records of H100, L40S; allowed is one card"):
        Runs.read(tmp_path)


def test_a_file_that_is_no_record_is_a_named_error(tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "other.json").write_text("[]")
    for path in (tmp_path / "other.json", tmp_path / "missing.json"):
        result = invoke("matrix", "--record", path)
        assert result.exit_code == (1 if path.exists() else 2)
        assert ("no record of a GPU test run" if path.exists() else "--record") in result.stderr


def test_write_replaces_what_is_between_the_markers(tmp_path: Path, invoke: Invoke) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START_MARK}\nold\n{END_MARK}\nafter\n")
    shown = invoke("matrix", "--markdown", "--write", page).stdout
    assert page.read_text() == f"before\n{START_MARK}\n{shown}{END_MARK}\nafter\n"
    assert shown == markdown(support_matrix()) + "\n"


def test_a_page_without_markers_is_a_named_error() -> None:
    with pytest.raises(CacheError, match="no place for the table"):
        rendered_readme("# title", support_matrix())


def test_rows_of_equal_cells_are_one_row() -> None:
    table = support_matrix()
    short = collapsed(table)
    assert len(short.rows) == len({tuple(entry.text for entry in entries) for entries in table.rows.values()}) < 6
    assert ", ".join(table.rows) != ", ".join(short.rows), "rows that differ from their neighbours stay apart"
    assert sorted(", ".join(short.rows).split(", ")) == sorted(table.rows), "no feature is lost"
    for names, entries in short.rows.items():
        for name in names.split(", "):
            assert [entry.text for entry in table.rows[name]] == [entry.text for entry in entries]


def test_every_refusal_of_the_short_table_has_its_reason() -> None:
    table = support_matrix()
    text = markdown(table)
    assert text.count("\n- ") == len(table.reasons)
    assert all(reason in text for reason in table.reasons)


def test_the_matrix_at_80_columns_has_short_marks_and_whole_labels(tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    record = write_record(tmp_path / "gpu_tests.json", "test_grid.py::test[fa3-f16-b1-causal]")
    monkeypatch.setenv("COLUMNS", "80")
    lines = invoke("matrix", "--record", record).stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 70
    table = support_matrix(record)
    for name, entries in table.rows.items():
        (line,) = (line for line in lines if re.match(rf" {re.escape(name.replace('`', ''))} +[-+c]", line))
        marks = line.removeprefix(f" {name.replace('`', '')}").split()
        assert len(marks) == len(entries)
        for mark, entry in zip(marks, entries, strict=True):
            number = str(table.reasons.index(entry.reason) + 1) if entry.reason else ""
            assert mark == {"runs": "+", "ran": "+", "compiles": "c", "refused": f"-{number}"}[entry.state]
    assert any(line.startswith("+ runs, or ran on H100; c compiles") for line in lines)
    monkeypatch.setenv("COLUMNS", "140")
    wide = invoke("matrix", "--record", record).stdout.split()
    assert set(" ".join(lines[-10:]).split()) <= {*wide, "+", "runs,", "or"}, "no word of the reasons is broken"
