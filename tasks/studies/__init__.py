"""Studies of what the method is made of: `python -m tasks.studies.NAME --help`."""
