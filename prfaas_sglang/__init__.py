"""What runs inside SGLang: the `prfaas` transfer backend, the CPU engine, and the fleet launcher."""

__version__ = "0.1.0"
