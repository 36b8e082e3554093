"""Pure core of the KV transfer: framing, layout, sessions. No sockets, no clock, no threads, no torch."""
