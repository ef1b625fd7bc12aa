"""Stand-ins of a GPU, one for each height at which code meets it; every test takes the lowest one that it can.

============== ================================================= ==========================================================
module         takes the place of                                below it is real
============== ================================================= ==========================================================
``libcuda``    libcuda.so.1, a C library that checks what CUDA   nothing; above it everything: contexts, modules, launches,
               checks and counts what was asked of it            tensor maps, counters, by ctypes. A process for each test
``gpu``        loading and launching: kernels decode their       the CPU backend, which computes their answers
               parameters (``kernel``, ``backward_kernels``)
``driver``     ``driver()``: streams, events and contexts that   part of ``gpu``: events end when the test says so
               note what was asked of them
``inner``      a FlashAttnInner whose launches the test          nothing of a GPU; above it the actor, on arrays of the CPU
               completes, or that fails at random
============== ================================================= ==========================================================

``arrays`` and ``tensors`` are host memory that says it is on a GPU, without a framework and in torch.
"""

from __future__ import annotations
