"""Rows: dataset versions and the review queue."""
