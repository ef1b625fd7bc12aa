"""Kernels that the tests of the compiler and the launcher use: real specs, the quickest to compile."""

from __future__ import annotations

from dataclasses import replace

from atomr_accel_flashattn.kernels.dropout_mask import DropoutMaskSpec
from atomr_accel_flashattn.kernels.fa2_bwd import Fa2BackwardSpec
from atomr_accel_flashattn.kernels.fa2_fwd import Fa2ForwardSpec
from atomr_accel_flashattn.kernels.fa3_fp8 import Fa3Fp8ForwardSpec
from atomr_accel_flashattn.kernels.fa3_fp8_kvcache import Fa3Fp8KvCacheSpec
from atomr_accel_flashattn.kernels.fa3_fwd import Fa3ForwardSpec
from atomr_accel_flashattn.kernels.fa3_kvcache import Fa3KvCacheSpec
from atomr_accel_flashattn.kernels.fp8_kvcache import Fp8KvCacheSpec, Fp8ScheduledKvCacheSpec
from atomr_accel_flashattn.kernels.kv_append import Fp8AppendSpec, KvAppendSpec
from atomr_accel_flashattn.kernels.kvcache import Fa2KvCacheSpec, SplitCombineSpec
from atomr_accel_flashattn.kernels.merge_states import MergeStatesSpec
from atomr_accel_flashattn.kernels.spec import Tile
from atomr_accel_flashattn.kernels.step import ScheduledKvCacheSpec, StepScheduleSpec
from atomr_accel_flashattn.types import DType, SmArch

MASK = DropoutMaskSpec(arch=SmArch.SM_80)
FORWARD = Fa2ForwardSpec(arch=SmArch.SM_80, dtype=DType.F16, head_dim=64, v_head_dim=64, tile=Tile(block_m=64, block_n=64, warps=4))
BACKWARD = Fa2BackwardSpec(arch=SmArch.SM_80, dtype=DType.F16, head_dim=32, v_head_dim=32, tile=Tile(block_m=64, block_n=64, warps=4))
WGMMA = Fa3ForwardSpec(
    arch=SmArch.SM_90A,
    dtype=DType.F16,
    head_dim=64,
    v_head_dim=64,
    tile=Tile(block_m=64, block_n=32, warps=8, stages=2, persistent=True),
)
FP8 = Fa3Fp8ForwardSpec(
    arch=SmArch.SM_90A,
    dtype=DType.F8E4M3,
    v_dtype=DType.F8E5M2,
    out_dtype=DType.BF16,
    head_dim=64,
    v_head_dim=64,
    tile=replace(WGMMA.tile, block_n=64),
)
FP8_WGMMA_CACHE = Fa3Fp8KvCacheSpec(
    arch=SmArch.SM_90A,
    dtype=DType.F8E4M3,
    out_dtype=DType.BF16,
    head_dim=64,
    v_head_dim=64,
    tile=WGMMA.tile,
    paged=True,
    block_descales=True,
)
CACHE = Fa2KvCacheSpec(
    arch=SmArch.SM_80, dtype=DType.F16, head_dim=32, v_head_dim=32, tile=Tile(block_m=16, block_n=16, warps=4), paged=True, split=True
)
WGMMA_CACHE = Fa3KvCacheSpec(arch=SmArch.SM_90A, dtype=DType.F16, head_dim=64, v_head_dim=64, tile=WGMMA.tile, paged=True, split=True)
COMBINE = SplitCombineSpec.of(CACHE)
SCHEDULED = ScheduledKvCacheSpec(arch=SmArch.SM_80, dtype=DType.F16, head_dim=32, v_head_dim=32, tile=CACHE.tile, paged=True)
STEP = (StepScheduleSpec.before(SCHEDULED), *SCHEDULED.steps())
MERGE = MergeStatesSpec(arch=SmArch.SM_80, dtype=DType.F16)
APPEND = KvAppendSpec(arch=SmArch.SM_80, dtype=DType.F16, paged=True)
_FP8 = {"arch": SmArch.SM_89, "dtype": DType.F16, "k_dtype": DType.F8E4M3, "v_dtype": DType.F8E5M2, "paged": True}
FP8_CACHES = (
    *(kind(**_FP8, head_dim=32, v_head_dim=32, tile=CACHE.tile) for kind in (Fp8KvCacheSpec, Fp8ScheduledKvCacheSpec)),
    Fp8AppendSpec(**_FP8),
)
