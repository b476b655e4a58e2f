"""What an answer may be: copied fields, calls, schemas of requests."""
