"""Chat completions as OpenAI's clients expect them: the routes, the request's fields, the answer's documents."""
