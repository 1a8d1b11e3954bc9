"""mPLUG-2: a modular foundation model for text, images and video."""

from mplug2 import ops
from mplug2.composition import compose, composition_table, list_tasks
from mplug2.config import ModelConfig
from mplug2.model import Model, create_model, list_models
from mplug2.weights import LoadReport, WeightsError

__version__ = "0.1.0"
__all__ = [
    "LoadReport", "Model", "ModelConfig", "WeightsError", "compose", "composition_table", "create_model", "list_models",
    "list_tasks", "ops",
]  # fmt: skip
