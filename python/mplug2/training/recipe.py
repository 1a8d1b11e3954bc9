"""Recipes: everything that decides what a training run does, in one TOML file."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

STAGE_DATA = ("crops", "stills", "clips")


@dataclass(frozen=True)
class Stage:
    """One stage: its data, how much of it, and its learning rates. Sizes are those of the run, over all processes.

    data "crops": single items cut out of frames, and a class head on the mean of the vision encoder's tokens.
    data "stills": single frames with a caption and a question. data "clips": whole clips with a caption and a question.
    """

    name: str
    data: str
    num_samples: int
    batch_size: int
    muon_lr: float
    adamw_lr: float
    final_lr: float = 0.05  # share of the learning rates that the cosine ends at
    warmup_steps: int = 50
    still_batch_size: int = 0  # clips: so many stills in every step beside them
    still_weight: float = 0.5  # of their loss
    crop_batch_size: int = 0  # clips: so many crops in every step, which keep the items known
    kept_patches: int = 0  # clips: encode only so many patch positions, those of most contrast; 0: all of them
    codec_share: float = 0.0  # clips: so many of them are encoded to h264 and decoded, the others drawn at once

    @property
    def num_steps(self) -> int:
        return self.num_samples // self.batch_size


@dataclass(frozen=True)
class Recipe:
    """A whole run. The same recipe, pictures and number of processes give the same weights."""

    model: str
    stages: tuple[Stage, ...]
    seed: int = 0
    num_processes: int = 2  # of one thread each, with gradients averaged over them
    weight_decay: float = 0.05
    label_smoothing: float = 0.05  # of the class head
    color_weight: float = 0.3  # of the class head's loss for colors, against 1 for items
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    checkpoint_steps: int = 500
    start_from: str = ""  # a model folder whose weights the first stage begins with
    without_local_temporal: bool = False  # leave the local temporal modules out, to measure what they are for

    def __post_init__(self):
        if not self.stages:
            raise ValueError("recipe: needs at least one stage")
        for stage in self.stages:
            if stage.data not in STAGE_DATA:
                raise ValueError(f"recipe: data must be one of {', '.join(STAGE_DATA)}, got {stage.data!r}")
            for size in (stage.batch_size, stage.still_batch_size, stage.crop_batch_size):
                if size % self.num_processes:
                    raise ValueError(
                        f"recipe: stage {stage.name!r}: {size} samples a step do not divide over "
                        f"{self.num_processes} processes"
                    )


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from TOML. Unknown or missing names and wrong types are a ValueError naming the file."""
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as e:
        raise ValueError(f"{path}: not valid TOML: {e}") from None
    stages = raw.pop("stages", [])
    if not isinstance(stages, list):
        raise ValueError(f"{path}: stages must be an array of tables, [[stages]]")
    raw["stages"] = tuple(_build(Stage, stage, f"{path}: stages[{i}]") for i, stage in enumerate(stages))
    return _build(Recipe, raw, str(path))


def _build(cls, raw: dict, where: str):
    types = {"str": str, "bool": bool, "int": int, "float": (int, float), "tuple[Stage, ...]": tuple}
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(raw) - set(fields)):
        raise ValueError(f"{where}: unknown name {unknown[0]!r}; known are {', '.join(fields)}")
    for f in fields.values():
        if f.name not in raw and f.default is dataclasses.MISSING:
            raise ValueError(f"{where}: {f.name} is missing")
        if f.name in raw and (
            not isinstance(raw[f.name], types[f.type]) or isinstance(raw[f.name], bool) != (f.type == "bool")
        ):
            raise ValueError(f"{where}: {f.name} must be {f.type}, got {raw[f.name]!r}")
    return cls(**raw)
