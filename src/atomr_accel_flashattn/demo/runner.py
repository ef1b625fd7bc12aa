"""Run the cases on the GPU of this machine or on the CPU backend, and name the kernels that do them on every architecture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.device_array import DeviceArray
from ..dispatch import arch_of_capability, lookup
from ..env import settings
from ..errors import ArchUnsupportedError, DeviceMismatchError, DriverTooOldError, NoDriverError
from ..kernels.spec import KernelSpec
from ..launch.driver import check, current_context, device_count, device_properties, driver
from ..requests.dense import DenseFwdRequest
from ..requests.options import MaskKind
from ..runtime.execute import run
from ..runtime.plan import Output
from ..types import Device, SmArch
from .cases import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Backend", "CaseResult", "choose_backend", "kernels_of", "run_case"]

_REPEATS = 50
_SECONDS = 0.5  # steady calls are repeated for about this long
_LONG_SECONDS = 2.0  # on the CPU: nothing is compiled there, so the first call is a steady one


@dataclass(frozen=True, slots=True)
class Backend:
    """Where the demo runs: device, its name for people, and the reason when a GPU was not taken."""

    device: Device
    name: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One case done.

    Attributes:
        case: its name.
        backend: where it ran.
        kernel: what ran.
        error: largest distance from the known output.
        allowed: the tolerance of docs/semantics.md for it.
        first_seconds: the first call: compile or read from the cache, load, run.
        seconds: a steady call, until its result is there.
        lse: float32 (1, Hq, Sq), for the picture.
    """

    case: str
    backend: str
    kernel: str
    error: float
    allowed: float
    first_seconds: float
    seconds: float
    lse: NDArray[np.float32] = field(repr=False)

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.error <= self.allowed


def choose_backend(wanted: str = "auto") -> Backend:
    """The CPU for ``"cpu"``, the first GPU for ``"gpu"``, whatever works for ``"auto"`` (ATOMR_FLASHATTN_BACKEND may narrow it).

    Raises:
        DeviceMismatchError: a GPU was demanded and there is none.
        DriverTooOldError: a GPU was demanded and its driver is too old.
        ArchUnsupportedError: a GPU was demanded and no kernel is built for it.
    """
    wanted = settings().backend if wanted == "auto" else wanted
    if wanted == "cpu":
        return Backend(Device("cpu", 0), "CPU", "as asked")
    try:
        return _first_gpu()
    except (DeviceMismatchError, DriverTooOldError, ArchUnsupportedError) as error:
        if wanted == "gpu":
            raise
        return Backend(Device("cpu", 0), "CPU", "no GPU on this machine" if isinstance(error, DeviceMismatchError) else str(error))


def _first_gpu() -> Backend:
    try:
        driver()
    except NoDriverError as error:
        raise DeviceMismatchError("device: got 'gpu' on a machine without one; use 'cpu'; atomr-flashattn info tells more") from error
    if device_count() == 0:
        raise DeviceMismatchError("device: got 'gpu' on a machine that shows none; use 'cpu'; atomr-flashattn info tells more")
    facts = device_properties(0)
    arch_of_capability(*facts.compute_capability)
    return Backend(Device("cuda", 0), facts.name)


def run_case(case: Case, backend: Backend) -> CaseResult:
    """Run ``case`` and compare what comes out with what is known.

    Raises:
        RuntimeFlashAttnError: the compiler, the driver or the device failed.
    """
    on_gpu = backend.device.kind == "cuda"
    q, k, v = (DeviceArray.from_numpy(x, backend.device.index) if on_gpu else x for x in (case.q, case.k, case.v))
    request = DenseFwdRequest(q, k, v, mask=MaskKind.causal() if case.causal else MaskKind.full())
    wait = _waiter(backend.device)

    def call() -> Output:
        return run(request)

    began = time.perf_counter()
    output = call()
    wait()
    first = time.perf_counter() - began
    return CaseResult(
        case=case.name,
        backend=backend.name,
        kernel=lookup(request.dispatch_key()).kernel_name,
        error=case.error(_to_numpy(output.out)),
        allowed=case.allowed_error(),
        first_seconds=first,
        seconds=_steady_seconds(call, wait, first, on_cpu=not on_gpu),
        lse=_to_numpy(output.lse),
    )


def kernels_of(cases: Iterable[Case], archs: Iterable[SmArch]) -> list[KernelSpec]:
    """The kernels that do ``cases`` on ``archs``, in that order, each once."""
    requests = [DenseFwdRequest(case.q, case.k, case.v, mask=MaskKind.causal() if case.causal else MaskKind.full()) for case in cases]
    specs = [lookup(request.dispatch_key(arch)) for arch in archs for request in requests]
    return list(dict.fromkeys(spec for spec in specs if isinstance(spec, KernelSpec)))


def _to_numpy(array: Any) -> NDArray[Any]:
    return array.numpy() if isinstance(array, DeviceArray) else np.asarray(array)


def _waiter(device: Device) -> Callable[[], None]:
    """What has to be called until the device has done all work; nothing on the CPU."""
    if device.kind == "cpu":
        return lambda: None

    def wait() -> None:
        with current_context(device.index):
            check(driver().cuCtxSynchronize(), "cuCtxSynchronize")

    return wait


def _steady_seconds(call: Callable[[], Output], wait: Callable[[], None], first: float, *, on_cpu: bool) -> float:
    """Mean of enough calls for about half a second, with one wait at their end; a long call on the CPU is not repeated."""
    if first > _LONG_SECONDS and on_cpu:
        return first
    repeats = int(min(_REPEATS, max(1, _SECONDS / first)))
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - began) / repeats
