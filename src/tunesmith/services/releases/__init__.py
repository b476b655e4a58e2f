"""Versions and rollouts: register, approve, verify, export, roll out and back, and the log of it."""
