"""Parts of bench_index_service: the publisher, the two services, the open loop."""
