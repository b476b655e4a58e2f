"""The shapes a row may have (messages, prompt-completion, Alpaca, ShareGPT, OpenAI) and tool calls in rows."""
