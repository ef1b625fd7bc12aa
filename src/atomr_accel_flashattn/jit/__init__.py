"""From a KernelSpec to a running kernel: source, compile, cache, parameters, launch."""
