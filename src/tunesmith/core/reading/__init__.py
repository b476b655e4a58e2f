"""Strict, bounded readers of what others wrote: JSON, YAML, text files, patterns, JSON Schemas."""
