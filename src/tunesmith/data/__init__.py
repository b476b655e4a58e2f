"""Sources, licences, privacy, duplicates, splits, sealing."""
