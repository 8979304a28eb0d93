"""What scripts/benchmark.py measures, a module each with `run(options) -> rows` and `table(rows) -> Markdown`."""
