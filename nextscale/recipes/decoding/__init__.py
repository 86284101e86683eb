"""Faster decoding of trained systems: `apply(system, config)` gives a system that shares all weights."""
