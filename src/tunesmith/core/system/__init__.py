"""This machine: files, memory, processes, threads, HTTP clients and a Ray cluster."""
