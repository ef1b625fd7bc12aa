"""Which kernel families the tests of this folder run with: every one that the card has, each test with each."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from atomr_accel_flashattn.dispatch import arch, best_arch, choice
from atomr_accel_flashattn.fa2 import Fa2FwdRequest
from atomr_accel_flashattn.kernels.spec import Family
from atomr_accel_flashattn.launch.driver import device_count, device_properties
from atomr_accel_flashattn.requests.dense import DenseFwdRequest
from atomr_accel_flashattn.runtime import plan
from atomr_accel_flashattn.torch_ops import repeat as plans
from atomr_accel_flashattn.types import Device, SmArch

if TYPE_CHECKING:
    import pytest

    from atomr_accel_flashattn.launch.driver import DeviceProperties

__all__ = ["DEVICE", "FAMILIES", "HAS_FP8", "HAS_WGMMA", "blocks_for", "pretend_multiprocessors", "use_family"]

DEVICE = os.environ.get("ATOMR_FLASHATTN_TEST_DEVICE", "cuda:0")
HAS_WGMMA = DEVICE != "cpu" and device_count() > 0 and device_properties(0).compute_capability == (9, 0)
HAS_FP8 = DEVICE == "cpu" or (device_count() > 0 and device_properties(0).compute_capability >= (8, 9))
FAMILIES = (Family.FA2, Family.FA3) if HAS_WGMMA else (Family.FA2,)
FEW_BLOCKS = 3  # of persistent kernels, so that they take many tiles each in tests of any size


def blocks_for(name: str) -> int | None:
    """Half of the tests of the FA3 family, by their name, see a card of three multiprocessors; the other half (None) see it as it is.

    So persistent kernels run wherever there are more tiles than that, and a block for each tile unless a test is large.
    """
    return FEW_BLOCKS if zlib.crc32(name.encode()) % 2 else None


def pretend_multiprocessors(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the patch is undone: who chooses persistent blocks, and who counts them, take the card to have so many multiprocessors."""

    def pretended(index: int) -> DeviceProperties:
        return device_properties(index)._replace(multiprocessors=count)

    for module in (choice, plan):
        monkeypatch.setattr(module, "device_properties", pretended)


@contextlib.contextmanager
def use_family(family: Family, monkeypatch: pytest.MonkeyPatch, blocks: int | None = None) -> Iterator[None]:
    """Until the end of a test: what dense requests of :mod:`tests.gpu.harness`, packed requests and functional calls are answered with.

    On Hopper the FA3 family is what all of them take by default; for the FA2 family the card is said to be one without wgmma. ``blocks``
    is what the FA3 family takes for the number of multiprocessors; None is the truth.
    """
    if not HAS_WGMMA:
        yield
        return
    from tests.gpu import harness

    plans.clear()
    if family is Family.FA2:
        monkeypatch.setattr(arch, "_arch_of_gpu", lambda _index: SmArch.SM_90)
        monkeypatch.setattr(harness, "DENSE", Fa2FwdRequest)
    else:
        monkeypatch.setattr(harness, "DENSE", DenseFwdRequest)
        if blocks is not None:
            pretend_multiprocessors(blocks, monkeypatch)
    found, expected = best_arch(Device("cuda", 0)), SmArch.SM_90 if family is Family.FA2 else SmArch.SM_90A
    assert found is expected, f"calls compile for {found.value} by default; the tests of the {family.value} family want {expected.value}"
    yield
    plans.clear()
