"""What a policy costs in answers: suites of tasks, sweeps over policies and budgets, the critical footprint."""
