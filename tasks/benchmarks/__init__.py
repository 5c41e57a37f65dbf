"""Studies of the project's own tools: `python -m tasks.benchmarks.NAME --help`."""
