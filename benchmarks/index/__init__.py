"""What bench_index measures: prefix indexes behind one face."""
