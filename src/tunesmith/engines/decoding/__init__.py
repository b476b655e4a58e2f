"""What engines in this process share to decode: prompts, constraints, the choice of a token."""
