"""Checks of training on this machine's device, with random bases."""
