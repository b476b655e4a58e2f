"""The formats a row may have (messages, prompt-completion, Alpaca, ShareGPT, OpenAI) and tool calls in rows."""
