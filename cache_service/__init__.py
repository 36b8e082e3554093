"""The global prefix index: which site and worker holds the KV of which prefix."""
