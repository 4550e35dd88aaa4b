"""What the benchmarks share: contenders timed in turn, and results as a table and CSV rows."""
