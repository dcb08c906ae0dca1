"""The command line and what it runs: predictions, benchmarks, self-test, tuning, warm-up."""
