"""Pages on runs: the list of jobs, one job with its curves and log, and the form that starts one."""
