"""From an accepted request to its recorded answer: turns, versions, threads, records."""
