"""Work on one image click by click, and on many images one after another."""

from .interactive import InteractiveSession
from .stream import encode_stream, predict_stream

__all__ = ["InteractiveSession", "encode_stream", "predict_stream"]
