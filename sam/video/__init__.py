"""Tracking objects through the frames of a video with SAM 2."""
