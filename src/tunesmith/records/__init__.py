"""What the records of each kind state: one model a kind, by which its maker writes it and all others read it."""
