"""HTTP: the OpenAI-compatible API and the control API."""
