"""Writes a trained model in the formats of other programs: merged weights and GGUF."""
