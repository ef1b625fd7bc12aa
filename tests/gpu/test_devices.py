"""Other devices and other array libraries, and what a GPU refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from atomr_accel_flashattn import functional  # noqa: E402 - after the skip
from atomr_accel_flashattn.arrays.device_array import DeviceArray  # noqa: E402
from atomr_accel_flashattn.errors import DeviceMismatchError, DTypeError, FeatureNotBuiltError, FlashAttnError  # noqa: E402
from atomr_accel_flashattn.fa2 import MaskKind  # noqa: E402
from atomr_accel_flashattn.runtime.execute import run  # noqa: E402
from tests.cases import GPU_DTYPES, Case, build  # noqa: E402
from tests.check import Run, check_arrays  # noqa: E402
from tests.gpu.harness import DEVICE, dense, download, execute, make_call, make_request  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.torch, pytest.mark.skipif(DEVICE == "cpu", reason="about GPUs")]

CASE = Case(heads=4, heads_kv=2, batch=2, seqlen_q=150, seqlen_k=170, right=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("case", [CASE, replace(CASE, dropout_p=0.3), replace(CASE, lengths_q=(30, 90), lengths_k=(40, 90))], ids=str)
def test_a_device_that_is_not_current(case: Case) -> None:
    torch.cuda.set_device(0)
    inputs = build(case)
    on_first = execute(make_call(inputs, device="cuda:0"))
    output = run(make_request(inputs, "cuda:1"))
    torch.cuda.synchronize(1)
    assert output.out.device == torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    assert torch.zeros(1, device="cuda").device.index == 0
    assert download(output.out).tobytes() == on_first.out.tobytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_arrays_on_two_devices_are_refused() -> None:
    q = torch.randn(1, 8, 1, 64, device="cuda:0", dtype=torch.float16)
    with pytest.raises(DeviceMismatchError, match="cuda:1"):
        dense(q, q.to("cuda:1"), q)


def test_device_arrays_without_a_framework() -> None:
    for dtype in GPU_DTYPES:
        inputs = build(CASE.with_dtype(dtype))
        q, k, v = (DeviceArray.from_numpy(np.ascontiguousarray(x)) for x in (inputs.q, inputs.k, inputs.v))
        output = run(dense(q, k, v, mask=MaskKind.causal()))
        check_arrays(str(CASE), inputs, Run(output.out.numpy(), output.lse.numpy()))


def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    inputs = build(CASE)
    out = functional.flash_attn_func(*(cupy.asarray(x) for x in (inputs.q, inputs.k, inputs.v)), causal=True)
    assert isinstance(out, cupy.ndarray)
    check_arrays(str(CASE), inputs, Run(cupy.asnumpy(out)))


def test_a_dlpack_object_with_out() -> None:
    class Exported:
        """A framework that is known by its protocol only."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: object) -> object:
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.tensor.__dlpack_device__()

    inputs = build(CASE)
    tensors = [torch.from_numpy(x).to(DEVICE) for x in (inputs.q, inputs.k, inputs.v)]
    out = torch.full_like(tensors[0], float("nan"))
    functional.flash_attn_func(*(Exported(x) for x in tensors), causal=True, out=Exported(out))
    torch.cuda.synchronize()
    check_arrays(str(CASE), inputs, Run(download(out)))


def test_float32_is_refused_on_a_gpu() -> None:
    q = torch.randn(1, 8, 1, 64, device=DEVICE)
    with pytest.raises(FlashAttnError, match=r"f(loat)?16") as refusal:
        run(dense(q, q, q))
    assert isinstance(refusal.value, DTypeError) or "f32" in str(refusal.value)


def test_requests_refuse_gradients_and_never_drop_them() -> None:
    q = torch.randn(1, 8, 1, 64, device=DEVICE, dtype=torch.float16, requires_grad=True)
    with pytest.raises(FeatureNotBuiltError, match=r"q requires grad.*autograd records flash_attn_func"):
        dense(q, q, q)
    with torch.no_grad():
        assert run(dense(q, q, q)).out.shape == q.shape


def test_cpu_and_gpu_arrays_are_not_mixed() -> None:
    q = torch.randn(1, 8, 1, 64, device=DEVICE, dtype=torch.float16)
    with pytest.raises(DeviceMismatchError):
        dense(q, q.cpu(), q)
