"""The modules of SAM 2 at the import paths of the official package."""
