"""The kernels as values: KernelSpec, its source text, and one module per kernel header."""
