"""Building a dataset version: read shards of the sources, examine rows, remove duplicates, seal the splits."""
