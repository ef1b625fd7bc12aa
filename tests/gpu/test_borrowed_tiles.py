"""Tiles of architectures that are not at hand, compiled for this card: their cut of the work is right, whatever the instruction set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn.kernels.spec import Family  # noqa: E402 - after the skip
from atomr_accel_flashattn.types import SmArch  # noqa: E402 - after the skip
from tests.cases import GPU_DTYPES, Alibi, Case  # noqa: E402
from tests.check import check_case  # noqa: E402
from tests.gpu.harness import DEVICE, run_inputs  # noqa: E402
from tests.inputs import Layout  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(DEVICE == "cpu", reason="the CPU backend has no tiles")]


@pytest.fixture
def family() -> Family:
    """The one whose tiles differ from arch to arch."""
    return Family.FA2


ARCHS = (SmArch.SM_80, SmArch.SM_86, SmArch.SM_89, SmArch.SM_120)
WIDTHS = ((32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (72, 200))
FEATURES = (
    {},
    {"right": 0},
    {"left": 40, "right": 0, "sink_tokens": 5},
    {"right": 0, "dropout_p": 0.2, "learned_sink": True},
    {"left": 30, "right": 30, "alibi": Alibi.HEADS, "softcap": 10.0, "layout": Layout.ODD},
    {"lengths_q": (100, 0, 150), "lengths_k": (100, 20, 260), "right": 0, "softmax_scale": -0.1},
)


def cases() -> list[Case]:
    """Every width with every feature; the element types take turns."""
    rows = [(width, features) for width in WIDTHS for features in FEATURES]
    sizes = {"heads": 4, "heads_kv": 2, "seqlen_q": 150, "seqlen_k": 270}
    return [Case(head_dim=d, v_head_dim=dv, dtype=GPU_DTYPES[n % 2], **(sizes | features)) for n, ((d, dv), features) in enumerate(rows)]


@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: arch.value)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_tiles_of_another_arch(case: Case, arch: SmArch, record_property: Callable[[str, object], None]) -> None:
    report = check_case(case, partial(run_inputs, tiles_for=arch))
    record_property("tiles_for", arch.value)
    record_property("dtype", case.dtype.value)
    record_property("ratio", round(report.ratio, 4))
    record_property("share", round(report.error / report.bound, 4) if report.bound else 0.0)
