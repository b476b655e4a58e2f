"""Served requests: drift, held answers, and what operators look at."""
