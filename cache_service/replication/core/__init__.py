"""Pure parts of replication: keys, values, and what a reader makes of them."""
