"""FlashAttention for NVIDIA GPUs: CUDA C++ kernels that NVRTC compiles on first use, and a CPU backend with the same semantics.

Names are loaded when they are first used (PEP 562): importing the package costs next to nothing and never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .actor import FlashAttnActor, FlashAttnHandle, FlashAttnInner, FlashAttnMsg, FlashAttnPool, FlashAttnProps, Overflow, Reply
    from .arrays.device_array import DeviceArray
    from .bert_padding import index_first_axis, pad_input, unpad_input
    from .dispatch import (
        DISPATCH_TABLE,
        F16,
        FEATURES,
        Bf16,
        Cell,
        CpuSpec,
        DispatchTable,
        F8E4m3,
        F8E5m2,
        FaBwdDispatch,
        FaFwdDispatch,
        FaPagedFwdDispatch,
        GemmSupported,
        best_arch,
        lookup,
        with_features,
    )
    from .dispatch.key import DispatchKey, Extras
    from .env import Settings, settings
    from .errors import (
        ActorError,
        ActorStoppedError,
        ArchUnsupportedError,
        ArrayTypeError,
        CacheError,
        CacheWarning,
        CompileError,
        ConstructionError,
        CuSeqlensError,
        DeviceLostError,
        DeviceMismatchError,
        DispatchError,
        DriverTooOldError,
        DropoutError,
        DTypeError,
        FeatureNotBuiltError,
        FlashAttnError,
        HeadCountError,
        HeadDimError,
        LaunchError,
        MailboxFullError,
        MockAnswerError,
        NoDriverError,
        NvrtcMissingError,
        OutputError,
        PropsError,
        RayMissingError,
        RequestTimeoutError,
        RuntimeFlashAttnError,
        ScaleError,
        ScheduleError,
        ShapeError,
        SinkWithoutMaskError,
        SlopesError,
        SoftcapError,
        StaleArrayError,
        StrideError,
        UnknownMessageError,
        UnsupportedArgumentError,
        WindowError,
        WorkerLostError,
    )
    from .fa2 import Fa2FwdRequest
    from .fa3 import Fa3FwdRequest, PersistentMode
    from .functional import (
        flash_attn_func,
        flash_attn_kvpacked_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_kvpacked_func,
        flash_attn_varlen_qkvpacked_func,
    )
    from .kernels.spec import Family, KernelSpec, Tile
    from .requests.dense import DenseFwdRequest
    from .requests.options import AttentionOptions, MaskKind, PositionBias
    from .runtime.execute import run
    from .runtime.plan import Output
    from .types import Device, DType, SmArch
    from .varlen import CumulativeSeqlens, VarlenFwdRequest

__version__ = "0.1.0"

__all__ = [
    "DISPATCH_TABLE",
    "F16",
    "FEATURES",
    "ActorError",
    "ActorStoppedError",
    "ArchUnsupportedError",
    "ArrayTypeError",
    "AttentionOptions",
    "Bf16",
    "CacheError",
    "CacheWarning",
    "Cell",
    "CompileError",
    "ConstructionError",
    "CpuSpec",
    "CuSeqlensError",
    "CumulativeSeqlens",
    "DType",
    "DTypeError",
    "DenseFwdRequest",
    "Device",
    "DeviceArray",
    "DeviceLostError",
    "DeviceMismatchError",
    "DispatchError",
    "DispatchKey",
    "DispatchTable",
    "DriverTooOldError",
    "DropoutError",
    "Extras",
    "F8E4m3",
    "F8E5m2",
    "Fa2FwdRequest",
    "Fa3FwdRequest",
    "FaBwdDispatch",
    "FaFwdDispatch",
    "FaPagedFwdDispatch",
    "Family",
    "FeatureNotBuiltError",
    "FlashAttnActor",
    "FlashAttnError",
    "FlashAttnHandle",
    "FlashAttnInner",
    "FlashAttnMsg",
    "FlashAttnPool",
    "FlashAttnProps",
    "GemmSupported",
    "HeadCountError",
    "HeadDimError",
    "KernelSpec",
    "LaunchError",
    "MailboxFullError",
    "MaskKind",
    "MockAnswerError",
    "NoDriverError",
    "NvrtcMissingError",
    "Output",
    "OutputError",
    "Overflow",
    "PersistentMode",
    "PositionBias",
    "PropsError",
    "RayMissingError",
    "Reply",
    "RequestTimeoutError",
    "RuntimeFlashAttnError",
    "ScaleError",
    "ScheduleError",
    "Settings",
    "ShapeError",
    "SinkWithoutMaskError",
    "SlopesError",
    "SmArch",
    "SoftcapError",
    "StaleArrayError",
    "StrideError",
    "Tile",
    "UnknownMessageError",
    "UnsupportedArgumentError",
    "VarlenFwdRequest",
    "WindowError",
    "WorkerLostError",
    "__version__",
    "best_arch",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "index_first_axis",
    "lookup",
    "pad_input",
    "run",
    "settings",
    "unpad_input",
    "with_features",
]

_NAMES_OF = {
    "actor": (
        "FlashAttnActor",
        "FlashAttnHandle",
        "FlashAttnInner",
        "FlashAttnMsg",
        "FlashAttnPool",
        "FlashAttnProps",
        "Overflow",
        "Reply",
    ),
    "bert_padding": (
        "index_first_axis",
        "pad_input",
        "unpad_input",
    ),
    "arrays.device_array": ("DeviceArray",),
    "dispatch": (
        "DISPATCH_TABLE",
        "FEATURES",
        "Bf16",
        "Cell",
        "CpuSpec",
        "DispatchTable",
        "F8E4m3",
        "F8E5m2",
        "F16",
        "FaBwdDispatch",
        "FaFwdDispatch",
        "FaPagedFwdDispatch",
        "GemmSupported",
        "best_arch",
        "lookup",
        "with_features",
    ),
    "env": (
        "Settings",
        "settings",
    ),
    "errors": (
        "ActorError",
        "ActorStoppedError",
        "ArchUnsupportedError",
        "ArrayTypeError",
        "CacheError",
        "CacheWarning",
        "CompileError",
        "ConstructionError",
        "CuSeqlensError",
        "DTypeError",
        "DeviceLostError",
        "DeviceMismatchError",
        "DispatchError",
        "DriverTooOldError",
        "DropoutError",
        "FeatureNotBuiltError",
        "FlashAttnError",
        "HeadCountError",
        "HeadDimError",
        "LaunchError",
        "MailboxFullError",
        "MockAnswerError",
        "NoDriverError",
        "NvrtcMissingError",
        "OutputError",
        "PropsError",
        "RayMissingError",
        "RequestTimeoutError",
        "RuntimeFlashAttnError",
        "ScaleError",
        "ScheduleError",
        "ScheduleError",
        "ShapeError",
        "SinkWithoutMaskError",
        "SlopesError",
        "SoftcapError",
        "StaleArrayError",
        "StrideError",
        "UnknownMessageError",
        "UnsupportedArgumentError",
        "WindowError",
        "WorkerLostError",
    ),
    "runtime.execute": ("run",),
    "runtime.plan": ("Output",),
    "requests.dense": ("DenseFwdRequest",),
    "fa2": ("Fa2FwdRequest",),
    "fa3": ("Fa3FwdRequest", "PersistentMode"),
    "functional": (
        "flash_attn_func",
        "flash_attn_kvpacked_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
    ),
    "kernels.spec": (
        "Family",
        "KernelSpec",
        "Tile",
    ),
    "dispatch.key": (
        "DispatchKey",
        "Extras",
    ),
    "requests.options": (
        "AttentionOptions",
        "MaskKind",
        "PositionBias",
    ),
    "types": (
        "Device",
        "DType",
        "SmArch",
    ),
    "varlen": (
        "CumulativeSeqlens",
        "VarlenFwdRequest",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if name == "bert_padding":  # a module that flash-attn's users reach by its name
        return importlib.import_module(f".{name}", __name__)
    if module is None:
        from .limits import NOT_BUILT

        why = f": {NOT_BUILT[name]}" if name in NOT_BUILT else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{why}")
    value = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
