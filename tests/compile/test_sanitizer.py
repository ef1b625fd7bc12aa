"""tools/sanitizer.py where there is no GPU: the planted kernels compile, and a tool that does not find the fault is not believed."""

from __future__ import annotations

from typing import Any

import pytest

from atomr_accel_flashattn.dispatch import cells
from atomr_accel_flashattn.jit.nvrtc import compile_source
from atomr_accel_flashattn.kernels.spec import Family, KernelSpec
from atomr_accel_flashattn.runtime import plan as store
from tests.case_lists import pairwise_cases
from tests.cases import GPU_DTYPES
from tests.jit.kernels import APPEND
from tools import sanitizer, sanitizer_faults

CLEAN = "========= ERROR SUMMARY: 0 errors\n"
NO_RACE = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
RACE = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
RIGHT = '{"cases": 9, "of": 9, "failed": []}\n'


@pytest.mark.parametrize("planted", [False, True])
@pytest.mark.parametrize("tool", sanitizer.TOOLS)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_planted_kernels_compile(arch: str, tool: str, planted: bool) -> None:
    assert compile_source("fa3_planted", sanitizer_faults.source(tool, "fa3_planted", planted=planted), arch).cubin


@pytest.mark.parametrize(
    ("family", "tool", "planted", "cases", "fine"),
    [
        ("fa2", "memcheck", (9, "at fa2_planted_memcheck"), (0, CLEAN, RIGHT), True),
        ("fa2", "memcheck", (0, CLEAN), (0, CLEAN, RIGHT), False),  # it looks at none of our kernels
        ("fa2", "memcheck", (9, "at fa2_sound_memcheck, at fa2_planted_memcheck"), (0, CLEAN, RIGHT), False),  # it cries wolf
        ("fa2", "memcheck", (9, "at fa2_planted_memcheck"), (9, "========= ERROR SUMMARY: 1 error\n", RIGHT), False),
        ("fa2", "memcheck", (9, "at fa2_planted_memcheck"), (None, "", ""), False),
        ("fa2", "memcheck", (9, "at fa2_planted_memcheck"), (1, CLEAN, '{"cases": 9, "of": 9, "failed": ["one"]}\n'), False),
        ("fa2", "racecheck", (9, "at fa2_planted_racecheck"), (0, NO_RACE, RIGHT), True),
        ("fa2", "racecheck", (9, "at fa2_planted_racecheck"), (9, RACE, RIGHT), False),
        ("fa3", "racecheck", (9, "at fa3_planted_racecheck"), (9, RACE, RIGHT), True),  # to be explained
        ("fa3", "racecheck", (0, NO_RACE), (0, NO_RACE, RIGHT), False),
    ],
)
def test_a_tool_is_believed_once_it_has_found_the_fault(
    monkeypatch: pytest.MonkeyPatch, family: str, tool: str, planted: tuple[Any, ...], cases: tuple[Any, ...], fine: bool
) -> None:
    def under_tool(_tool: str, _family: str, program: str, *_arguments: str, limit: float) -> sanitizer.Outcome:
        status, log, *output = planted if program == "sanitizer_faults.py" else cases
        return sanitizer.Outcome(status, "".join(output), log)

    monkeypatch.setattr(sanitizer, "under_tool", under_tool)
    verdict, said = sanitizer.examine(family, tool, 1.0)
    assert verdict.fine is fine
    assert planted[1] in said


def test_every_kernel_is_one_that_the_tools_look_at() -> None:
    names = {step.kernel_name for cell in cells() if isinstance(cell.spec, KernelSpec) for step in cell.spec.steps()}
    assert names
    names.add(APPEND.kernel_name)
    assert all(name.startswith(sanitizer.NAMES) for name in names)
    assert {begin for begin in sanitizer.NAMES if any(name.startswith(begin) for name in names)} == {*sanitizer.NAMES}


@pytest.mark.torch
def test_the_kernels_that_cases_need_are_found_without_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # what the tool sets for its whole process ends with this test
    from tests.fakes.gpu import STREAM, FakeGpu
    from tests.fakes.tensors import fake
    from tests.gpu import harness
    from tools import sanitizer_cases

    gpu = FakeGpu()
    gpu.install(monkeypatch)
    to_host = harness._flat_tensor
    monkeypatch.setattr(harness, "_flat_tensor", lambda storage, _device: fake(to_host(storage, "cpu")))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: STREAM, raising=False)
    monkeypatch.setattr(harness, "synchronize", lambda: None)
    fp8 = {family: sanitizer_cases.fp8_checks(family) for family in (Family.FA2, Family.FA3)}
    fa2, fa3 = (
        len(sanitizer_cases.checks(family)) - len(sanitizer_cases.ON_CACHES[family]) - len(sanitizer_cases.OUTSIDE) - len(fp8[family])
        for family in (Family.FA2, Family.FA3)
    )
    fa3 -= len(sanitizer_cases.SPLIT)
    assert fa2 == 2 * fa3 + len(sanitizer_cases.APPENDS) + len(sanitizer_cases.MERGED) > 200
    dropped = [case for case in pairwise_cases(GPU_DTYPES) if case.dropout_p]
    chosen = [next(case for case in dropped if case.is_varlen is varlen) for varlen in (False, True)]
    made = [*map(sanitizer_cases.Check.forward, [*chosen, chosen[0]]), sanitizer_cases.Check.backward(chosen[0])]
    monkeypatch.setattr(sanitizer_cases, "checks", lambda _family: made)
    made += [sanitizer_cases.Check.append("one token, paged"), sanitizer_cases.Check.merge((2, 3, 4, 8))]
    monkeypatch.setattr(sanitizer_cases.cases, "upload", lambda array: fake(torch.from_numpy(array.copy())))
    made.append(sanitizer_cases.Check.outside(1, 16, 3))
    made.append(fp8[Family.FA3][0])
    *specs, again, before, backward, behind, append, cached, merged, split, combine, narrow = sanitizer_cases.needed_specs(Family.FA2)
    assert [spec.kernel_name.split("_sm")[0] in {"fa2_fwd", "fa3_fwd"} for spec in specs] == [True, False] * 3
    assert [spec.kernel_name for spec in specs[1::2]] == ["dropout_mask_sm90", "dropout_mask_sm90_varlen", "dropout_mask_sm90"]
    assert again == specs[0]
    assert [spec.HEADER for spec in (before, backward, behind)] == ["bwd_preprocess", "fa2_bwd", "bwd_postprocess"]
    assert [spec.HEADER for spec in (append, cached, merged)] == ["kv_append", "fa2_kvcache", "merge_states"]
    assert [spec.HEADER for spec in (split, combine)] == ["fa2_kvcache", "split_combine"]
    assert narrow.HEADER == "fa3_fp8"
    assert gpu.launches == gpu.specs == []
    assert not store._plans
