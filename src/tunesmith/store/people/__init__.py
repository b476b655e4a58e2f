"""Users with their roles, keys, tokens and sessions."""
