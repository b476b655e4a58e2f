"""Runs: trainings, searches and forecasts, here or as jobs, with what they are expected to cost."""
