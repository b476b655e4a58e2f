"""Users, their tokens and their keys."""
