"""The backward kernels on a card, launched one by one: no call does it yet. Inputs, o and LSE come from the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.arrays.read import read_array  # noqa: E402 - after the skip
from atomr_accel_flashattn.dispatch import (  # noqa: E402
    best_arch,
    key_of_backward,
    lookup,
)
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec  # noqa: E402
from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402
from atomr_accel_flashattn.launch.launcher import load_kernel  # noqa: E402
from atomr_accel_flashattn.problem import ArrayInfo, BackwardProblem, GradientArrays  # noqa: E402
from atomr_accel_flashattn.tiles.tables import backward_tile_for  # noqa: E402
from atomr_accel_flashattn.types import DType, SmArch  # noqa: E402
from tests.case_lists import hazard_cases, head_dim_cases, pairwise_cases  # noqa: E402
from tests.cases import GPU_DTYPES, Case  # noqa: E402
from tests.check import check_gradients  # noqa: E402
from tests.gpu.families import DEVICE  # noqa: E402
from tests.gpu.harness import download, upload  # noqa: E402
from tests.inputs import Inputs, Layout, place  # noqa: E402
from tests.oracle import Gradients, Upstream  # noqa: E402
from tests.reference.running import backward_problem_of  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(DEVICE == "cpu", reason="these are kernels of a GPU")]


@pytest.fixture(autouse=True)
def family() -> Family:
    """The only one that has a backward."""
    return Family.FA2


@pytest.mark.parametrize("case", hazard_cases(GPU_DTYPES), ids=str)
def test_hazard(case: Case):
    check_gradients(case, differentiate)


@pytest.mark.parametrize("case", pairwise_cases(GPU_DTYPES), ids=str)
def test_every_pair_of_features(case: Case):
    check_gradients(case, differentiate)


@pytest.mark.parametrize("case", head_dim_cases([DType.F16])[::2], ids=str)
def test_tiles_of_99_kb(case: Case):
    check_gradients(case, lambda inputs, upstream: differentiate(inputs, upstream, SmArch.SM_86))


def differentiate(inputs: Inputs, upstream: Upstream, tiles_of: SmArch | None = None) -> Gradients:
    """The three launches, into gradients and workspaces full of NaN."""
    problem = _on_device(backward_problem_of(inputs, upstream))
    layout = Layout.ODD if inputs.q.strides[-2] % 16 else Layout.PADDED
    made = [upload(place(np.full(x.shape, np.nan, x.dtype), layout)) for x in (inputs.q, inputs.k, inputs.v)]
    gradients = GradientArrays(*(read_array(each, "gradient") for each in made))
    device = gradients.dq.device if gradients.dq is not None else problem.forward.q.device
    spec = lookup(key_of_backward(problem, gradients, best_arch(device)))
    if tiles_of is not None:
        spec = replace(spec, tile=backward_tile_for(tiles_of, spec.head_dim, spec.v_head_dim))
    dsink = None if inputs.learned_sink is None else torch.full((inputs.heads,), float("nan"), device=DEVICE)
    _launch(spec, problem, gradients, dsink)
    torch.cuda.synchronize()
    dq, dk, dv = (download(each) for each in made)
    return Gradients(dq, dk, dv, None if dsink is None else download(dsink))


def _launch(spec: Fa2BackwardSpec, problem: BackwardProblem, gradients: GradientArrays, dsink: torch.Tensor | None) -> None:
    known = problem.forward
    workspace = {
        "delta": torch.full(known.lse_shape, float("nan"), device=DEVICE),
        "dq_sum": torch.full(known.q.shape, float("nan"), device=DEVICE),
        "dsink": dsink,
    }
    infos: dict[str, Any] = {
        **{name: getattr(known, name) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "alibi_slopes", "learned_sink")},
        "rng": known.dropout and known.dropout.rng,
        "o": problem.out,
        "lse": problem.lse,
        "dout": problem.dout,
        "dlse": problem.dlse,
        **gradients._asdict(),
    }
    addresses = {name: 0 if info is None else info.ptr for name, info in infos.items()}
    addresses |= {name: 0 if array is None else array.data_ptr() for name, array in workspace.items()}
    for step in spec.steps():
        tiles, params = step.work_tiles(known), step.pack(problem, gradients)
        if tiles:
            launch = load_kernel(step, known.q.device.index).launch_of(params, tiles, params.SLOTS)
            launch.launch(torch.cuda.current_stream().cuda_stream, tuple(addresses[name] for name in params.SLOTS))
    torch.cuda.synchronize()


def _on_device(problem: BackwardProblem) -> BackwardProblem:
    """The same problem with every array on the device, in its layout."""

    def moved(info: ArrayInfo | None) -> Any:
        return None if info is None else read_array(upload(info.source), "array")

    known = problem.forward
    names = ("q", "k", "v", "alibi_slopes", "learned_sink", "cu_seqlens_q", "cu_seqlens_k")
    known = replace(known, **{name: moved(getattr(known, name)) for name in names})
    if known.dropout is not None:
        known = replace(known, dropout=replace(known.dropout, rng=moved(known.dropout.rng)))
    return replace(problem, forward=known, **{name: moved(getattr(problem, name)) for name in ("out", "lse", "dout", "dlse")})
