"""A trained model in formats of other programs: merged weights, GGUF."""
