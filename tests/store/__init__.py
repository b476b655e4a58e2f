"""Tests of the store: records, audit log, identities."""
