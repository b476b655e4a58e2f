"""Parts of benchmarks/learning.py: what is kept between runs, our own trainings, peers, and the lines of the table."""
