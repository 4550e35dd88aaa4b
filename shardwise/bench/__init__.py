"""What `shardwise bench` measures; each benchmark is a module with `run(results, options)`.

The scripts of a checkout's `benchmarks/` share what is here: contenders that are timed in turn, and
results as a table and CSV rows that say where they were measured.
"""
