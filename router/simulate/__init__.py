"""Discrete events in virtual time over the router's own decision core (docs/simulation.md)."""
