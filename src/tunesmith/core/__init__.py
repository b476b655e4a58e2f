"""Digests, canonical JSON, errors, clock, files: nothing that knows the domain."""
