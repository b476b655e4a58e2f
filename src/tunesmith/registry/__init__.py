"""The registry: versions, aliases, approvals, signatures, verification and export."""
