"""Texts of strangers: how they are compared, shown and accepted as names."""
