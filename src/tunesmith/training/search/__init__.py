"""Search for better training settings: which to try, how long, and which go on."""
