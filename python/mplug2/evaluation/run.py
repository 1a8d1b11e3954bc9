"""Evaluation of a model on a data folder: read the annotations, predict, keep the predictions, measure."""

from __future__ import annotations

import json
from pathlib import Path

from rich.progress import track

from mplug2.evaluation.accuracy import Share, answer_accuracy
from mplug2.evaluation.clothes import caption_accuracy
from mplug2.model import Model

METRICS = ("accuracy", "clothes")
_FILES = {"video-captioning": "captions.jsonl", "video-qa": "answers.jsonl"}
_DEFAULT_METRIC = {"video-captioning": "clothes", "video-qa": "accuracy"}
_BATCH = 16


def evaluate(
    model: Model,
    task: str,
    folder: str | Path,
    *,
    metric: str | None = None,
    predictions: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Share]:
    """Measure a model on a folder of videos and annotations.

    Args:
        task: "video-captioning" reads folder/captions.jsonl, lines {"video", "caption"}; "video-qa" reads
            folder/answers.jsonl, lines {"video", "question", "answer"}.
        metric: "accuracy" (the text is right, and for questions the same for each question) or "clothes" (what captions
            of moving clothes name). Default: "clothes" for captions, "accuracy" for answers.
        predictions: file to write, one line a prediction: the annotation's fields and "prediction".
        progress: show a bar.

    Returns:
        Name -> how many of how many were right.
    """
    if task not in _FILES:
        raise ValueError(f"evaluate: task must be one of {', '.join(_FILES)}, got {task!r}")
    metric = metric or _DEFAULT_METRIC[task]
    if metric not in METRICS or (metric == "clothes" and task != "video-captioning"):
        raise ValueError(f"evaluate: metric {metric!r} does not measure {task}; there are {', '.join(METRICS)}")
    folder = Path(folder)
    key = "caption" if task == "video-captioning" else "answer"
    lines = read_lines(folder / _FILES[task], ("video", key) if key == "caption" else ("video", "question", key))
    batches = [lines[i : i + _BATCH] for i in range(0, len(lines), _BATCH)]
    texts: list[str] = []
    for batch in track(batches, description=task, disable=not progress):
        videos = [folder / line["video"] for line in batch]
        if key == "caption":
            texts += model.caption(videos, batch_size=_BATCH)
        else:
            texts += model.answer(videos, [line["question"] for line in batch], batch_size=_BATCH)
    if predictions is not None:
        rows = [json.dumps({**line, "prediction": text}) for line, text in zip(lines, texts, strict=True)]
        Path(predictions).write_text("".join(row + "\n" for row in rows))
    truths = [line[key] for line in lines]
    if metric == "clothes":
        return caption_accuracy(texts, truths)
    result = {"accuracy": answer_accuracy(texts, truths)}
    for question in dict.fromkeys(line.get("question") for line in lines):
        if question is not None:
            of = [i for i, line in enumerate(lines) if line["question"] == question]
            result[question] = answer_accuracy([texts[i] for i in of], [truths[i] for i in of])
    return result


def read_lines(path: Path, names: tuple[str, ...]) -> list[dict]:
    """JSON lines that each hold the given names; ValueError names file and line where one does not."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a data folder holds videos and {path.name}")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}:{number}: not valid JSON: {e}") from None
        if not isinstance(line, dict) or any(not isinstance(line.get(n), str) for n in names):
            raise ValueError(f"{path}:{number}: expected an object with strings {', '.join(names)}, got {text}")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path}: holds no lines")
    return lines
