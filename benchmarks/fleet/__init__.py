"""Real SGLang workers on the two sides of an emulated link; see benchmarks/bench_fleet.py."""
