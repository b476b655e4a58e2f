"""Evaluations and verdicts, and what a person looks up in them."""
