"""Rows that people review: the queue, how far reviewers agree, and the decisions that a build reads."""
