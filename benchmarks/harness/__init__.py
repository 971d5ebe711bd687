"""What all benchmarks share: names and colors, command line, JSON, tables, plots, programs, clock.

``names``, ``sizes``, ``output``, ``table``, ``plot`` and ``clock`` import no JAX.
"""
