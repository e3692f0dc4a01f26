"""Automatic masks: how much at a time, and from crops of an image to the masks of all of it."""
