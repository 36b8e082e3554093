"""Profiles of published models, with the source of every number."""
