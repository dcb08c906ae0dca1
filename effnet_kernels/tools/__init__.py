"""The command line and its commands: predictions, benchmarks, self-test, tuning, warm-up."""
