"""Rows to look at: label noise, languages, toxicity, names of people, near-identical requests."""
