"""Measurements: ``python -m benchmarks --help``. Not part of the installed packages."""
