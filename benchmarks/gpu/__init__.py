"""The GPU table: `python -m benchmarks.gpu PART ...` (make bench-gpu)."""
