"""From rows to the batches of each step: rendering, canaries, the order of rows."""
