"""Fine-tuning jobs of OpenAI's clients: a file that was uploaded goes through the project's own pipeline.

`arguments.py` has what a client asks for, `create.py` accepts it, `perform.py` does it in a worker, `models.py` finds
the version behind a `ft:` name.
"""
