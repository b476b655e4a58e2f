"""The parts of service.py: one module each, which gives its lines of the table and its figures."""
