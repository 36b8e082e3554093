"""The OpenAI-compatible front: decides which prefill worker, in which site, serves a request."""
