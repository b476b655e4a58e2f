"""The engine that gets its answers from a vLLM server."""
