"""A new project from a user's rows: examine them, infer a schema, write settings and prompts."""
