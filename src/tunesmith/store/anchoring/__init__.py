"""The audit log's newest entry, kept outside the store, and time stamps."""
