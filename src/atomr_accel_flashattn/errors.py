"""Every exception and warning that this package raises.

::

    FlashAttnError
     ├─ ConstructionError (ValueError)     an argument is wrong: raised before anything is allocated, compiled or launched
     │   ├─ ShapeError                     rank, or sizes that do not fit together
     │   ├─ DTypeError                     element type
     │   ├─ DeviceMismatchError            arrays on different devices, or a backend asked for that cannot reach them
     │   ├─ HeadCountError                 query heads are no multiple of KV heads
     │   ├─ HeadDimError                   head dim outside what a kernel can do
     │   ├─ StrideError                    last dimension not contiguous
     │   ├─ CuSeqlensError                 cumulative lengths: start, order, end, size
     │   ├─ SeqLensError                   lengths of a KV cache: size, range, more than there is room for
     │   ├─ BlockTableError                block table, rows or layout of a KV cache
     │   ├─ RotaryError                    rotary cos and sin: size, or too few rows
     │   ├─ ChunkLayoutError               a ChunkLayout that makes no sense, or does not fit the arrays
     │   ├─ SplitError                     num_splits outside its range, or with batch_invariant
     │   ├─ StepPlanError                  a StepPlan with numbers that make no sense, or with a call that it was not made for
     │   ├─ WindowError                    window sizes
     │   ├─ SinkWithoutMaskError           sink_tokens without a bounded window, where they would change nothing
     │   ├─ ScaleError                     softmax_scale not finite
     │   ├─ SoftcapError                   softcap negative or not finite
     │   ├─ DropoutError                   drop probability, or its (seed, offset) array
     │   ├─ SlopesError                    ALiBi slopes or learned sink
     │   ├─ DescaleError                   descales of fp8: type, shape, or with an array that is not fp8
     │   ├─ OutputError                    out=: shape, type, device, or needed and missing
     │   ├─ ArrayTypeError (TypeError)     an object that is no array we can read
     │   ├─ UnsupportedArgumentError       an argument of another package that has no meaning here
     │   ├─ ScheduleError                  PersistentMode with a number of blocks that makes no sense
     │   ├─ PropsError                     a property of an actor or a pool, as max_in_flight 0
     │   └─ UnknownMessageError (TypeError)  an object that is no FlashAttnMsg
     ├─ DispatchError                      the request is well formed, and no kernel does it
     │   ├─ ArchUnsupportedError           not on this architecture
     │   └─ FeatureNotBuiltError           not in this version; names the feature
     ├─ PagedCacheError (RuntimeError)     a PagedKvCache could not do what was asked; nothing of it has changed
     │   ├─ OutOfBlocksError               not enough free blocks
     │   └─ SequenceError (LookupError)    a sequence that was freed or never allocated, or that is named twice
     ├─ CacheOverflowError (RuntimeError)  `check` found a call over a KV cache on a GPU that had no room for a token; names the sequence
     ├─ ActorError (RuntimeError)          an actor or a pool could not take a request, or not bring it to an answer
     │   ├─ ActorStoppedError              it stopped, or had stopped, before the request was launched
     │   ├─ MailboxFullError               no place in the mailbox, and the caller did not want to wait for one
     │   ├─ RequestTimeoutError (TimeoutError)  the time that the caller gave a request is over
     │   ├─ StaleArrayError                an array was freed, resized or moved since its request was made; `run` raises it too
     │   ├─ MockAnswerError                what the mock inner answers to a request that is right; names the kernel
     │   └─ WorkerLostError                a Ray worker died with the request, and no retry was left
     └─ RuntimeFlashAttnError (RuntimeError)
         ├─ NoDriverError                  no NVIDIA driver on this machine
         ├─ DriverTooOldError              the driver is older than the kernels need
         ├─ NvrtcMissingError              the compiler library is not installed
         ├─ CompileError                   NVRTC refused a kernel: spec, log, path of the saved source
         ├─ CacheError                     a cache command that was asked for could not be done
         ├─ RayMissingError (ImportError)  a pool was asked for and Ray is not installed
         ├─ LaunchError                    CUDA refused a launch: error name, text, kernel
         └─ DeviceLostError                a sticky CUDA error: the process has to be restarted

    CacheWarning (UserWarning)             the disk cache cannot be used; the call goes on without it
    SettingsWarning (UserWarning)          an environment variable with our prefix that nothing reads

Messages say what was got, what is allowed, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "ActorError",
    "ActorStoppedError",
    "ArchUnsupportedError",
    "ArrayTypeError",
    "BlockTableError",
    "CacheError",
    "CacheOverflowError",
    "CacheWarning",
    "ChunkLayoutError",
    "CompileError",
    "ConstructionError",
    "CuSeqlensError",
    "DTypeError",
    "DescaleError",
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
    "OutOfBlocksError",
    "OutputError",
    "PagedCacheError",
    "PropsError",
    "RayMissingError",
    "RequestTimeoutError",
    "RotaryError",
    "RuntimeFlashAttnError",
    "ScaleError",
    "ScheduleError",
    "SeqLensError",
    "SequenceError",
    "SettingsWarning",
    "ShapeError",
    "SinkWithoutMaskError",
    "SlopesError",
    "SoftcapError",
    "SplitError",
    "StaleArrayError",
    "StepPlanError",
    "StrideError",
    "UnknownMessageError",
    "UnsupportedArgumentError",
    "WindowError",
    "WorkerLostError",
]


class FlashAttnError(Exception):
    """Root of the tree: catches everything that this package raises on purpose."""


class ConstructionError(FlashAttnError, ValueError):
    """An argument is wrong. Raised while the request is made; nothing has been allocated or written."""


class ShapeError(ConstructionError):
    """Wrong rank, or sizes that do not fit together."""


class DTypeError(ConstructionError):
    """An element type that is not allowed here."""


class DeviceMismatchError(ConstructionError):
    """Arrays of one call live on different devices, or not where the chosen backend can reach them."""


class HeadCountError(ConstructionError):
    """The number of query heads is no positive multiple of the number of KV heads."""


class HeadDimError(ConstructionError):
    """A head dim that no kernel takes."""


class StrideError(ConstructionError):
    """The last dimension is not contiguous, or strides make no sense."""


class CuSeqlensError(ConstructionError):
    """Cumulative sequence lengths that do not start at 0, decrease, end elsewhere than at the total, or have the wrong size."""


class SeqLensError(ConstructionError):
    """Lengths of sequences in a KV cache of the wrong size, negative, or with more tokens than there are slots."""


class BlockTableError(ConstructionError):
    """A block table, rows of a contiguous KV cache, or a layout that do not fit the cache."""


class RotaryError(ConstructionError):
    """Rotary cos and sin of the wrong shape or type, without new keys, or with fewer rows than there are positions."""


class ChunkLayoutError(ConstructionError):
    """A ChunkLayout that makes no sense, or chunks that do not fit q."""


class SplitError(ConstructionError):
    """``num_splits`` outside its range, or more than one with ``batch_invariant``."""


class StepPlanError(ConstructionError):
    """A StepPlan with numbers that make no sense, for another kind of call, without a schedule, or in another process."""


class WindowError(ConstructionError):
    """A window size that is not allowed."""


class SinkWithoutMaskError(ConstructionError):
    """``sink_tokens`` without a left window bound, where it would change nothing."""


class ScaleError(ConstructionError):
    """``softmax_scale`` is not a finite number."""


class SoftcapError(ConstructionError):
    """``softcap`` is negative or not finite."""


class DropoutError(ConstructionError):
    """A drop probability outside [0, 1), or a wrong (seed, offset) array."""


class SlopesError(ConstructionError):
    """ALiBi slopes or a learned sink of the wrong shape, type or device."""


class DescaleError(ConstructionError):
    """A descale: type, shape, or given with an array that is not fp8."""


class OutputError(ConstructionError):
    """``out=`` does not fit the call, or is needed and missing."""


class ArrayTypeError(ConstructionError, TypeError):
    """An object that is no array we can read."""


class UnsupportedArgumentError(ConstructionError):
    """An argument that a drop-in call knows by name and cannot honour; none is ignored."""


class ScheduleError(ConstructionError):
    """A PersistentMode that makes no sense."""


class PropsError(ConstructionError):
    """A property of an actor or a pool that is not allowed, as ``max_in_flight`` 0. Nothing has been started."""


class UnknownMessageError(ConstructionError, TypeError):
    """An object that is no message an actor knows."""


class DispatchError(FlashAttnError):
    """The request is well formed, and no kernel does it."""


class ArchUnsupportedError(DispatchError):
    """The architecture does not have what the request needs."""


class FeatureNotBuiltError(DispatchError):
    """A feature that this version does not have.

    Args:
        feature: its name, for programs (``"split"``, ``"fp8_backward"``, ``"left_pad"``, ...).
        reason: what was asked for and what to do instead, for people.
    """

    def __init__(self, feature: str, reason: str = "") -> None:
        self.feature = feature
        self.reason = reason
        super().__init__(f"'{feature}' is not built in this version" + (f": {reason}" if reason else ""))

    def __reduce__(self) -> tuple[type[FeatureNotBuiltError], tuple[str, str]]:
        return type(self), (self.feature, self.reason)


class PagedCacheError(FlashAttnError, RuntimeError):
    """A PagedKvCache could not do what was asked. Nothing has been written, and no block has changed hands."""


class OutOfBlocksError(PagedCacheError):
    """More blocks are needed than are free."""


class SequenceError(PagedCacheError, LookupError):
    """A sequence that was freed, that was never allocated, or that is named twice in one call."""


class CacheOverflowError(FlashAttnError, RuntimeError):
    """A call over a KV cache, whose lengths lay on a GPU, had no room for a token. What fits was written and attended.

    Args:
        sequence: its number in the batch of that call; of several, the last.
        device: number of the GPU.
    """

    def __init__(self, sequence: int, device: int) -> None:
        self.sequence = sequence
        self.device = device
        super().__init__(
            f"sequence {sequence} of a call over a KV cache on GPU {device} did not fit: got more tokens than slots, a new token without a "
            "page or a row of rotary embedding, or a length, padding or row that the cache does not have; that was not written; "
            "allowed are lengths up to the slots of a sequence; reserve more and make the call again; ATOMR_FLASHATTN_DEBUG=1 checks each"
        )

    def __reduce__(self) -> tuple[type[CacheOverflowError], tuple[int, int]]:
        return type(self), (self.sequence, self.device)


class ActorError(FlashAttnError, RuntimeError):
    """An actor or a pool could not take a request, or not bring it to an answer."""


class ActorStoppedError(ActorError):
    """The actor stopped, or had stopped, before the request was launched. ``__cause__`` says why, where there is more to say."""


class MailboxFullError(ActorError):
    """No place in the mailbox, and the caller did not want, or was not allowed, to wait for one."""


class RequestTimeoutError(ActorError, TimeoutError):
    """The time that the caller gave a request is over. A launch that was made is not undone; its inputs live until it has finished."""


class StaleArrayError(ActorError):
    """An array of a request was freed, resized or moved since the request was made, or until the reply: an answer would mean nothing."""


class MockAnswerError(ActorError):
    """What the mock inner answers to a request that is right.

    Args:
        kernel_name: the kernel that the request resolves to.
    """

    def __init__(self, kernel_name: str) -> None:
        self.kernel_name = kernel_name
        super().__init__(f"the mock inner computes nothing; the request is right and resolves to {kernel_name}")

    def __reduce__(self) -> tuple[type[MockAnswerError], tuple[str]]:
        return type(self), (self.kernel_name,)


class WorkerLostError(ActorError):
    """A Ray worker died, or lost its GPU, with the request, and no retry or no worker was left."""


class RuntimeFlashAttnError(FlashAttnError, RuntimeError):
    """The machine, the driver, the compiler or the cache failed."""


class NoDriverError(RuntimeFlashAttnError):
    """No NVIDIA driver on this machine."""


class DriverTooOldError(RuntimeFlashAttnError):
    """The driver is older than the kernels need."""


class NvrtcMissingError(RuntimeFlashAttnError):
    """The NVRTC library, or the CUDA headers it needs, are not installed."""


class CompileError(RuntimeFlashAttnError):
    """NVRTC refused a kernel, or built it in a way that may not be shipped.

    Args:
        message: one line.
        spec: the KernelSpec, or its name.
        log: NVRTC's log, whole.
        source_path: where the ``.cu`` was saved, None when it could not be.
    """

    def __init__(self, message: str, *, spec: object = None, log: str = "", source_path: Path | None = None) -> None:
        self.spec = spec
        self.log = log
        self.source_path = source_path
        name = getattr(spec, "kernel_name", spec)
        parts = [message]
        if name is not None:
            parts.append(f"kernel: {name}")
        if source_path is not None:
            parts.append(f"source: {source_path}")
        if log:
            parts.append(f"log:\n{log}")
        super().__init__("\n".join(parts))


class RayMissingError(RuntimeFlashAttnError, ImportError):
    """A pool was asked for, and the optional Ray is not installed."""


class CacheError(RuntimeFlashAttnError):
    """A cache command that was asked for (verify, clear, write) could not be done. Normal calls warn instead."""


class LaunchError(RuntimeFlashAttnError):
    """CUDA refused a launch.

    Args:
        message: one line.
        kernel_name: the kernel, when known.
        cuda_error: CUDA's name of the error, as ``CUDA_ERROR_INVALID_VALUE``.
    """

    def __init__(self, message: str, *, kernel_name: str = "", cuda_error: str = "") -> None:
        self.kernel_name = kernel_name
        self.cuda_error = cuda_error
        details = ", ".join(f"{what}: {text}" for what, text in (("kernel", kernel_name), ("CUDA error", cuda_error)) if text)
        super().__init__(f"{message} ({details})" if details else message)


class DeviceLostError(LaunchError):
    """A sticky CUDA error: every later call on this context fails too. Restart the process."""


class CacheWarning(UserWarning):
    """The disk cache cannot be used (read-only, full, corrupt); the call goes on without it."""


class SettingsWarning(UserWarning):
    """An environment variable with our prefix that is no setting: most likely a name with a typing mistake."""
