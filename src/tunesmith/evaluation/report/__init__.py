"""The report for people: HTML, Markdown, charts, advice."""
