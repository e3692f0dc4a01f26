"""The prompt encoder and the mask decoder at the import paths of the official package."""
