"""Loading and saving of weights."""

from mplug2.weights.folder import load_folder, save_folder
from mplug2.weights.load import LoadReport, WeightsError
from mplug2.weights.released import load_released
from mplug2.weights.start import load_bert, load_clip

__all__ = ["LoadReport", "WeightsError", "load_bert", "load_clip", "load_folder", "load_released", "save_folder"]
