"""Comparing methods on one's own task: the plan, the runs, the statistics, the report."""
