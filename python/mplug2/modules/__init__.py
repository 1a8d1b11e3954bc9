"""The modules of mPLUG-2, each usable alone."""

from mplug2.modules.decoder import Context, Decoder
from mplug2.modules.fusion import Fusion
from mplug2.modules.text import TextEncoder
from mplug2.modules.universal import UniversalLayers
from mplug2.modules.vision import LocalTemporal, VisionBlock, VisionEncoder

__all__ = [
    "Context", "Decoder", "Fusion", "LocalTemporal", "TextEncoder", "UniversalLayers", "VisionBlock", "VisionEncoder",
]  # fmt: skip
