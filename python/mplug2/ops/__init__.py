"""The compute of mPLUG-2 as six functions, each with a plain PyTorch reference, usable alone in any code."""

from mplug2.ops.add_layer_norm import add_layer_norm
from mplug2.ops.attention import attention
from mplug2.ops.fusion import fusion
from mplug2.ops.linear import linear
from mplug2.ops.linear_cross_entropy import linear_cross_entropy
from mplug2.ops.local_temporal import local_temporal
from mplug2.ops.registration import layer, layers

__all__ = [
    "add_layer_norm",
    "attention",
    "fusion",
    "layer",
    "layers",
    "linear",
    "linear_cross_entropy",
    "local_temporal",
]
