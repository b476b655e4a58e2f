"""The parts of benchmarks/console.py."""
