"""Connected components of masks."""

from .api import connected_components

__all__ = ["connected_components"]
