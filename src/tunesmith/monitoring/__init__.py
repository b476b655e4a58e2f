"""Drift and recall."""
