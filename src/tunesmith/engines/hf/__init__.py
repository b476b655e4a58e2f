"""Models of every other family, run by their transformers module."""
