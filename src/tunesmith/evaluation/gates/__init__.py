"""Gates, the verdict they add up to, and how many times a test set has been used."""
