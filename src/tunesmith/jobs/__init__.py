"""A durable queue of jobs in the project's database, and the worker that performs them.

`queue.py` has what people do, `leases.py` what workers do. Both change a job in one transaction.
"""
