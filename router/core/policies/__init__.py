"""The routing rules, one file each; router/core/policy.py calls them by name."""
