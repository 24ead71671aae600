"""The logit store."""

SCHEMA_VERSION = 3
"""Of the stores that this release writes and reads. Here, so that asking for it imports nothing."""
