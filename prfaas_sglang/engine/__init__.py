"""The only place, with `prfaas_sglang.cpu`, that knows SGLang and torch."""
