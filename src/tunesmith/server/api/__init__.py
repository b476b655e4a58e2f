"""/api: what the console's pages show and change, as JSON. Each module is one resource over the same services."""
