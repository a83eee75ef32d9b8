"""What bench.py, bench_causal.py and `python -m benchmarks.cpu_targets` share. Not part of the installed package."""
