"""Rows to look at: label noise, languages, names of people, near-identical requests."""
