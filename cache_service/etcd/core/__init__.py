"""Pure parts of the etcd client: what to ask, what to retry, what an answer means. Time is an argument."""
