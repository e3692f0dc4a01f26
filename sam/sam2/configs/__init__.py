"""Configs of the released models, at the places that they have in the official package."""
