"""The evaluation suites, one idea per file; `kvcompile.evaluation.samples.suite` finds them by name."""
