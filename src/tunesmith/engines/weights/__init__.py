"""Weights in files, and modules that read theirs late."""
