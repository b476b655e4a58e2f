"""Rollouts: move a name's traffic to a new version step by step, measure it, and promote it or go back."""
