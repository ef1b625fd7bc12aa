"""A planted fault for compute-sanitizer to find, beside the same kernel without it. Names begin as those of a kernel family do.

``PYTHONPATH=src compute-sanitizer --tool racecheck --kernel-name kns=fa3_ python tools/sanitizer_faults.py --tool racecheck --family fa3``.
A tool that does not report the planted kernel, or reports the sound one, is not looking at our kernels, and its word is worth nothing.
"""

from __future__ import annotations

import argparse
import ctypes

import numpy as np

from atomr_accel_flashattn.dispatch import arch_of_capability
from atomr_accel_flashattn.errors import LaunchError
from atomr_accel_flashattn.jit.nvrtc import compile_source
from atomr_accel_flashattn.launch.driver import LaunchConfig, check, current_context, device_properties, driver, launch_function

THREADS = 64
# What each tool is to find: a write beyond an array, a read of what nobody wrote, a missing barrier, a barrier that only some come to.
BODIES = {
    "memcheck": "out[t + (kPlanted ? kThreads : 0)] = in[t];",
    "initcheck": "out[t] = in[t + (kPlanted ? kThreads : 0)];",
    "racecheck": "shared[t] = in[t]; if (!kPlanted) __syncthreads(); out[t] = shared[kThreads - 1 - t];",
    "synccheck": "shared[t] = in[t]; if (!kPlanted || t < 48) __syncthreads(); out[t] = shared[kThreads - 1 - t];",
}
SOURCE = """\
extern "C" __global__ void {name}(const int* in, int* out) {{
  constexpr bool kPlanted = {planted};
  constexpr int kThreads = {threads};
  __shared__ volatile int shared[kThreads];
  const int t = threadIdx.x;
  {body}
}}
"""


def source(tool: str, name: str, *, planted: bool) -> str:
    """CUDA C++ of one kernel: ``in`` has twice as many elements as a block has threads, the first half written; ``out`` as many."""
    return SOURCE.format(name=name, planted=str(planted).lower(), threads=THREADS, body=BODIES[tool])


def launch(tool: str, name: str, *, planted: bool) -> None:
    """Compile one kernel, run one block of it, wait for it.

    Raises:
        LaunchError: the tool stopped it.
    """
    cuda, size = driver(), 4 * THREADS
    arch = arch_of_capability(*device_properties(0).compute_capability)
    cubin = compile_source(name, source(tool, name, planted=planted), arch.value).cubin
    with current_context(0):
        module = check(cuda.cuModuleLoadData(cubin), "loading")
        function = check(cuda.cuModuleGetFunction(module, name.encode()), "loading")
        arrays = [ctypes.c_uint64(int(check(cuda.cuMemAlloc(count), "allocating"))) for count in (2 * size, size)]
        written = np.arange(THREADS, dtype=np.int32)
        check(cuda.cuMemcpyHtoD(arrays[0].value, written.ctypes.data, size), "copying")
        config = LaunchConfig((1, 1, 1), (THREADS, 1, 1), 0)
        arguments = (ctypes.c_void_p * 2)(*map(ctypes.addressof, arrays))
        code = launch_function()(ctypes.byref(config), ctypes.c_void_p(int(function)), ctypes.byref(arguments), None)
        check((code,), "launching", name)
        check(cuda.cuCtxSynchronize(), "running", name)


def main() -> None:
    """Launch the sound kernel, then the planted one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=list(BODIES), required=True)
    parser.add_argument("--family", default="fa2", help="how the names of the kernels begin")
    arguments = parser.parse_args()
    launch(arguments.tool, f"{arguments.family}_sound_{arguments.tool}", planted=False)
    try:
        launch(arguments.tool, f"{arguments.family}_planted_{arguments.tool}", planted=True)
    except LaunchError as error:
        print(f"stopped: {error}")


if __name__ == "__main__":
    main()
