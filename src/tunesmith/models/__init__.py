"""Base models, tokenizers, rendering of a conversation."""
