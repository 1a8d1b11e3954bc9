"""Many files: sources (lazy) -> reading (processes) -> the model -> rows in a file that a killed run goes on with."""

from mplug2.inference.features import FeaturesFile
from mplug2.inference.results import ResultsFile
from mplug2.inference.run import Answering, Captioning, Embedding, Summary, run
from mplug2.inference.sources import Item, Share, find_items

__all__ = [
    "Answering",
    "Captioning",
    "Embedding",
    "FeaturesFile",
    "Item",
    "ResultsFile",
    "Share",
    "Summary",
    "find_items",
    "run",
]
