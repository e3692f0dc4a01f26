"""The HTTP service around :class:`sam.engine.Engine`. Needs the extra ``serve``."""

from .app import create_app
from .run import serve
from .settings import Settings

__all__ = ["Settings", "create_app", "serve"]
