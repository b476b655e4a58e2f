"""Decoding, and the engines behind one interface."""
