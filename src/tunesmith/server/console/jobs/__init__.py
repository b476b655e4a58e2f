"""Pages on runs: the list of jobs, one job with its curves and log, the form that starts one, and two compared."""
