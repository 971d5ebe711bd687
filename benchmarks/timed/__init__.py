"""What the benchmarks that need a GPU share: programs, their compilation, the clock."""
