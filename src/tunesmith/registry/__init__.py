"""Versions, aliases, approvals, signing."""
