"""The report for people: HTML, Markdown, plots, advice."""
