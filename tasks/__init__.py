"""Benchmark tasks of sbi_jeffreys, used from the clone as ``python -m tasks``."""
