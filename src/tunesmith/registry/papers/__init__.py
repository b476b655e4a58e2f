"""Papers about a version for people outside: model card, bill of materials, provenance, drafts for the EU AI Act."""
