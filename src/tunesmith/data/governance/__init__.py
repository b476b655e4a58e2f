"""Licences, sign-off by a steward, withdrawn rows, dataset cards, differences between versions."""
