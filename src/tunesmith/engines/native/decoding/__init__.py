"""Decoding many requests as one running batch."""
