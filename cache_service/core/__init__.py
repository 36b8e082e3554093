"""Pure core of the index: no sockets, no clock, no threads. Time and randomness are arguments."""
