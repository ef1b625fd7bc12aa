# The public names, each once. Type checkers read this file, and so does __init__.py, which loads a name when it is first used.

from . import bert_padding as bert_padding
from .actor import (
    FlashAttnActor as FlashAttnActor,
    FlashAttnHandle as FlashAttnHandle,
    FlashAttnInner as FlashAttnInner,
    FlashAttnMsg as FlashAttnMsg,
    FlashAttnPool as FlashAttnPool,
    FlashAttnProps as FlashAttnProps,
    Overflow as Overflow,
    Reply as Reply,
)
from .arrays.device_array import DeviceArray as DeviceArray
from .bert_padding import (
    index_first_axis as index_first_axis,
    index_first_axis_residual as index_first_axis_residual,
    index_put_first_axis as index_put_first_axis,
    pad_input as pad_input,
    unpad_input as unpad_input,
    unpad_input_for_concatenated_sequences as unpad_input_for_concatenated_sequences,
)
from .cached import CachedFwdRequest as CachedFwdRequest
from .dispatch import (
    DISPATCH_TABLE as DISPATCH_TABLE,
    F16 as F16,
    FEATURES as FEATURES,
    Bf16 as Bf16,
    Cell as Cell,
    CpuSpec as CpuSpec,
    DispatchTable as DispatchTable,
    F8E4m3 as F8E4m3,
    F8E5m2 as F8E5m2,
    FaBwdDispatch as FaBwdDispatch,
    FaFwdDispatch as FaFwdDispatch,
    FaPagedFwdDispatch as FaPagedFwdDispatch,
    GemmSupported as GemmSupported,
    best_arch as best_arch,
    lookup as lookup,
    with_features as with_features,
)
from .dispatch.key import (
    DispatchKey as DispatchKey,
    Extras as Extras,
)
from .env import (
    Settings as Settings,
    settings as settings,
)
from .errors import (
    ActorError as ActorError,
    ActorStoppedError as ActorStoppedError,
    ArchUnsupportedError as ArchUnsupportedError,
    ArrayTypeError as ArrayTypeError,
    BlockTableError as BlockTableError,
    CacheError as CacheError,
    CacheOverflowError as CacheOverflowError,
    CacheWarning as CacheWarning,
    ChunkLayoutError as ChunkLayoutError,
    CompileError as CompileError,
    ConstructionError as ConstructionError,
    CuSeqlensError as CuSeqlensError,
    DescaleError as DescaleError,
    DeviceLostError as DeviceLostError,
    DeviceMismatchError as DeviceMismatchError,
    DispatchError as DispatchError,
    DriverTooOldError as DriverTooOldError,
    DropoutError as DropoutError,
    DTypeError as DTypeError,
    FeatureNotBuiltError as FeatureNotBuiltError,
    FlashAttnError as FlashAttnError,
    HeadCountError as HeadCountError,
    HeadDimError as HeadDimError,
    LaunchError as LaunchError,
    MailboxFullError as MailboxFullError,
    MockAnswerError as MockAnswerError,
    NoDriverError as NoDriverError,
    NvrtcMissingError as NvrtcMissingError,
    OutOfBlocksError as OutOfBlocksError,
    OutputError as OutputError,
    PagedCacheError as PagedCacheError,
    PropsError as PropsError,
    RayMissingError as RayMissingError,
    RequestTimeoutError as RequestTimeoutError,
    RotaryError as RotaryError,
    RuntimeFlashAttnError as RuntimeFlashAttnError,
    ScaleError as ScaleError,
    ScheduleError as ScheduleError,
    SeqLensError as SeqLensError,
    SequenceError as SequenceError,
    SettingsWarning as SettingsWarning,
    ShapeError as ShapeError,
    SinkWithoutMaskError as SinkWithoutMaskError,
    SlopesError as SlopesError,
    SoftcapError as SoftcapError,
    SplitError as SplitError,
    StaleArrayError as StaleArrayError,
    StepPlanError as StepPlanError,
    StrideError as StrideError,
    UnknownMessageError as UnknownMessageError,
    UnsupportedArgumentError as UnsupportedArgumentError,
    WindowError as WindowError,
    WorkerLostError as WorkerLostError,
)
from .fa2 import (
    Fa2BwdRequest as Fa2BwdRequest,
    Fa2FwdRequest as Fa2FwdRequest,
)
from .fa3 import (
    Fa3FwdFp8Request as Fa3FwdFp8Request,
    Fa3FwdRequest as Fa3FwdRequest,
    PersistentMode as PersistentMode,
)
from .fp8 import (
    Quantized as Quantized,
    quantize as quantize,
    rotate_outliers as rotate_outliers,
)
from .functional import (
    flash_attn_func as flash_attn_func,
    flash_attn_kvpacked_func as flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func as flash_attn_qkvpacked_func,
    flash_attn_varlen_func as flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func as flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func as flash_attn_varlen_qkvpacked_func,
)
from .kernels.spec import (
    Family as Family,
    KernelSpec as KernelSpec,
    Tile as Tile,
)
from .merge import merge_states as merge_states
from .paged import (
    KvLayout as KvLayout,
    PagedAttentionRequest as PagedAttentionRequest,
    PagedKvCache as PagedKvCache,
)
from .prefill import (
    ChunkedPrefillRequest as ChunkedPrefillRequest,
    ChunkLayout as ChunkLayout,
)
from .requests.backward import DenseBwdRequest as DenseBwdRequest
from .requests.dense import DenseFwdRequest as DenseFwdRequest
from .requests.options import (
    AttentionOptions as AttentionOptions,
    Fp8Options as Fp8Options,
    MaskKind as MaskKind,
    PositionBias as PositionBias,
)
from .requests.step_plan import StepPlan as StepPlan
from .runtime.execute import run as run
from .runtime.gradients import Gradients as Gradients
from .runtime.overflow import check as check
from .runtime.plan import Output as Output
from .types import (
    Device as Device,
    DType as DType,
    ScaleUnit as ScaleUnit,
    SmArch as SmArch,
)
from .varlen import (
    CumulativeSeqlens as CumulativeSeqlens,
    VarlenBwdRequest as VarlenBwdRequest,
    VarlenFwdRequest as VarlenFwdRequest,
)
from .with_kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache

__version__: str
