"""The image encoder's modules at the import paths of the official package."""
