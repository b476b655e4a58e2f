"""The web console: pages for people who approve, watch and correct. It acts through `services` only."""
