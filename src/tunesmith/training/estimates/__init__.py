"""What a training takes and gives, before it begins: time, memory, more time."""
