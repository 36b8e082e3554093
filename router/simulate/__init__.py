"""Discrete events in virtual time over the router's own decision core: `prfaas simulate` (docs/simulation.md)."""
