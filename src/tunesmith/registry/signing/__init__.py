"""Keys, signatures of version folders and approvals, the signed release statement."""
