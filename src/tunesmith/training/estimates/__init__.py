"""What a training takes and gives, before it begins: time, memory, a forecast's subsets, more time."""
