"""The report for people: HTML, Markdown, plots, advice."""

from pathlib import Path

PAGE = Path(__file__).parent / "page"  # its templates and style sheets
