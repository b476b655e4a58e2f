"""Scorers, statistics, gates, verdict, report."""
