"""Scores of an answer: built-in scorers, declared scorers, judges, classification metrics."""
