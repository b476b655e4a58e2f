"""Attacks that belong to no one folder."""
