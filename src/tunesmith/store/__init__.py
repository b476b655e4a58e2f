"""Blobs, records, database, audit log, identities."""
