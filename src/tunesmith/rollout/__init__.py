"""Steps, analysis, controller."""
