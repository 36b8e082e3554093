"""Parts of bench_simulate: the peer and the cases."""
