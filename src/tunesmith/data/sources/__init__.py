"""Where rows come from: files, folders, patterns and URLs; compression; readers of each file type."""
