"""Training and decoding beside their peers, a part a module: what is measured, and the table of goals."""
