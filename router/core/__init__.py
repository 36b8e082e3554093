"""Pure core of the router: the decision, the stream parser. Time and randomness are arguments."""
