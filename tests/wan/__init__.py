"""A WAN on one machine: an emulated link between two network namespaces, for tests, benchmarks and people.

`docs/wan-bench.md` says how to use it, how accurate it is and where it stops being true.
"""
