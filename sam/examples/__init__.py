"""Examples of about 30 lines, each a program that a test runs: ``python -m sam.examples.drop_in photo.jpg 120 80``."""
