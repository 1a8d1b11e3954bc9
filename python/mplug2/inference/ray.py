"""The same work over a cluster with Ray Data: paths in, rows out, errors as a column. Needs the extra `ray`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import ray
import ray.data
import torch

from mplug2.data.loading import load_frames, read_ahead
from mplug2.model import Model, create_model


def caption(
    paths: Sequence[str] | ray.data.Dataset,
    model: str = "nano",
    *,
    num_actors: int = 1,
    num_gpus: float = 0,
    num_cpus: float = 1,
    batch_size: int = 32,
    create: dict | None = None,
    **options,
) -> ray.data.Dataset:
    """A lazy dataset with columns "file", "caption", "score" and "error".

    Where a file cannot be read "error" says why, caption is "" and score NaN; elsewhere error is "".

    Args:
        paths: paths that every node can read, or a dataset with a column "file" (others are kept).
        model: name or folder, as for `create_model`; create: its other options (weights, dtype as a torch.dtype, ...).
        num_actors: models; each has num_gpus GPUs and num_cpus cores.
        options: as for `Model.caption` (beam_size, ...), but one caption a file.

    Raises:
        ValueError: several captions are asked for.
    """
    if options.get("num_captions", 1) != 1:
        raise ValueError(f"ray caption: num_captions must be 1, a row holds one, got {options['num_captions']}")
    rows = paths if isinstance(paths, ray.data.Dataset) else ray.data.from_items([{"file": path} for path in paths])
    return rows.map_batches(
        _Captioner,
        fn_constructor_kwargs={"model": model, "on_gpu": num_gpus > 0, "create": create or {}, "options": options},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_gpus=num_gpus,
        num_cpus=num_cpus,
    )


class _Captioner:
    """One actor: a model that stays loaded, and threads that read ahead of it."""

    def __init__(self, model: str, on_gpu: bool, create: dict, options: dict) -> None:
        self._model = create_model(model, **{"device": "cuda" if on_gpu else "cpu"} | create)
        self._options = options

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        files = [str(file) for file in batch["file"]]
        clips = list(read_ahead(partial(_read, self._model), files))
        errors = {i: clip for i, clip in enumerate(clips) if isinstance(clip, str)}
        good = [i for i in range(len(files)) if i not in errors]
        found = dict(
            zip(good, self._model.caption((clips[i] for i in good), return_scores=True, **self._options), strict=True)
        )
        texts, scores = zip(*(found.get(i, ("", float("nan"))) for i in range(len(files))), strict=True)
        return {
            **batch,
            "caption": np.array(texts, object),
            "score": np.array(scores, np.float64),
            "error": np.array([errors.get(i, "") for i in range(len(files))], object),
        }


def _read(model: Model, file: str) -> torch.Tensor | str:
    """A clip as a batch of one, uint8 (1, 3, T, size, size), or why it cannot be read."""
    try:
        frames = load_frames(file, model.transform, num_frames=model.config.vision.num_frames)
    except ValueError as e:
        return str(e)
    return frames.permute(3, 0, 1, 2).unsqueeze(0)
