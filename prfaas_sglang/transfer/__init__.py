"""Shells of the KV transfer: sockets and threads around the pure sessions of `prfaas_sglang.core`."""
