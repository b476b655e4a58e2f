"""Risk probes: what is asked before and after tuning, what is measured, and what that shows."""
