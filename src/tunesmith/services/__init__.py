"""What the command line and HTTP share: actions on a project, each with a typed result."""
