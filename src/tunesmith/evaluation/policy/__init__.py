"""Policy checks: requests that every candidate is asked, and rules that its answers must keep."""
