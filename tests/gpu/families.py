"""Which kernel families the tests of this folder run with: every one that the card has, each test with each."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from atomr_accel_flashattn import dispatch, execute
from atomr_accel_flashattn.jit.driver import device_count, device_properties
from atomr_accel_flashattn.jit.spec import Family
from atomr_accel_flashattn.types import SmArch

if TYPE_CHECKING:
    import pytest

    from atomr_accel_flashattn.jit.driver import DeviceProperties

__all__ = ["DEVICE", "FAMILIES", "HAS_WGMMA", "use_family"]

DEVICE = os.environ.get("ATOMR_FLASHATTN_TEST_DEVICE", "cuda:0")
HAS_WGMMA = DEVICE != "cpu" and device_count() > 0 and device_properties(0).compute_capability == (9, 0)
FAMILIES = (Family.FA2, Family.FA3) if HAS_WGMMA else (Family.FA2,)
FEW_BLOCKS = 3  # of persistent kernels, so that they take many tiles each in tests of any size


@contextlib.contextmanager
def use_family(family: Family, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Until the end of a test: what requests of :func:`tests.gpu.harness.dense`, packed requests and functional calls are answered with.

    Half of the tests of the FA3 family, by their ``name``, run on a card of three multiprocessors: persistent kernels wherever there are
    more tiles than that. The other half have a block for each tile unless they are large.
    """
    if family is not Family.FA3:
        yield
        return
    from atomr_accel_flashattn import plans
    from atomr_accel_flashattn.fa3 import Fa3FwdRequest
    from tests.gpu import harness

    def on_few_blocks(index: int) -> DeviceProperties:
        return device_properties(index)._replace(multiprocessors=FEW_BLOCKS)

    plans.clear()
    monkeypatch.setattr(dispatch, "_arch_of_gpu", lambda _index: SmArch.SM_90A)
    monkeypatch.setattr(harness, "DENSE", Fa3FwdRequest)
    if zlib.crc32(name.encode()) % 2:
        monkeypatch.setattr(execute, "device_properties", on_few_blocks)
    yield
    plans.clear()
