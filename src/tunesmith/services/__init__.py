"""What the command line, HTTP and Python share: one function for each action, with a typed result.

One module for each noun. `result.document()` is what `--json` prints and what HTTP routes answer.
"""
