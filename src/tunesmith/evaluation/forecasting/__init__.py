"""Forecasts: held-out rows and subsets, what their scores say about the whole training, and what it costs."""
