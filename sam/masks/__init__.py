"""Masks: from logits to pixels, and the forms in which they are kept: run lengths, polygons, overlays."""
