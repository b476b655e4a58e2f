"""Confidence intervals, tests and power over groups of rows."""
