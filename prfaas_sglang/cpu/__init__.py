"""Real SGLang on a machine without a GPU: torch kernels, hooks, tiny models, a fork server for workers."""
