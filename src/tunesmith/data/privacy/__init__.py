"""Personal data and secrets in rows: finders, pseudonyms, and the measured detection recall."""
