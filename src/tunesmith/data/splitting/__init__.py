"""Train, validation and test: groups, duplicates, near duplicates, leakage between splits."""
