"""Reading of videos, pictures and text."""

from mplug2.data.images import read_image
from mplug2.data.loading import load, load_frames
from mplug2.data.source import MediaError
from mplug2.data.text import Tokenizer
from mplug2.data.transform import Transform
from mplug2.data.video import Clip, ClipBatch, read_clip, read_video, read_videos

__all__ = [
    "Clip",
    "ClipBatch",
    "MediaError",
    "Tokenizer",
    "Transform",
    "load",
    "load_frames",
    "read_clip",
    "read_image",
    "read_video",
    "read_videos",
]
