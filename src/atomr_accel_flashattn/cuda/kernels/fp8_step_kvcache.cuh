// SPDX-License-Identifier: Apache-2.0
// Forward attention over a cache of fp8 K and V in the blocks of a StepPlan (step_kvcache.cuh),
// with descales.
#pragma once

#include "attention/descales.cuh"
#include "kernels/step_kvcache.cuh"

namespace fa {

template <Config C>
__device__ __forceinline__ void fp8_step_kvcache(const DescaledStepParams& p) {
  step_kvcache<C>(p.params, KeyDescales<C, DescaledStepParams>(p));
}

}  // namespace fa
