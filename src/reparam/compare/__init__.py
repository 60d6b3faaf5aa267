"""Compare methods on your own task: the plan, the runs, the statistics and the report."""
