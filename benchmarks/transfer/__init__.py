"""Side-by-side benchmark of the KV transfer; run it with `python -m benchmarks.bench_transfer`."""
