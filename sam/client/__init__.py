"""Ask the service from Python, without torch: :class:`Client`."""

from .answers import RemoteImage, ServiceError
from .client import Client, RemoteMasks
from .video import RemoteFrame, RemoteVideo, VideoState

__all__ = ["Client", "RemoteFrame", "RemoteImage", "RemoteMasks", "RemoteVideo", "ServiceError", "VideoState"]
