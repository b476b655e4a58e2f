"""Answers that wait for a person before they leave: the rules that hold them, and their queue in the database."""
