"""Commands, one file a noun; thin; heavy imports inside commands."""
