"""Logging in and out, sessions, and a person's keys."""
