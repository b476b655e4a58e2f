"""Answers from a vLLM server."""
