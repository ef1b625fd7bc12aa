"""The driver, and launches: contexts, parameter blocks, tensor maps, counters."""
