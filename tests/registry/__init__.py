"""Tests of signing, versions, approvals and verification."""
