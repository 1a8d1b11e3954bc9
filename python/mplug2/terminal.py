"""What the commands share: a model loaded, results on stdout, talk on stderr, and the ways to end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import Progress

talk = Console(stderr=True)


def load_model(
    name: str,
    tasks: Sequence[str] | None,
    weights,
    random_weights: bool,
    seed: int,
    device: str,
    dtype: str,
    quantize: str | None = None,
):
    """The named model for those of `tasks` that its config lists, else for the first of them (None: all it lists);
    what does not fit is one line and status 2."""
    import torch

    from mplug2.model import create_model, resolve

    def create():
        torch.manual_seed(seed)
        own = [task for task in tasks if task in resolve(name)[1].tasks] or tasks[:1] if tasks else None
        number = getattr(torch, dtype)
        return create_model(
            name, task=own, weights=weights, random_weights=random_weights, device=find_device(device), dtype=number,
            quantize=quantize,
        )  # fmt: skip

    loaded = or_exit(create)
    if loaded.load_report is None:
        say(f"{name}: random weights, untrained: what it says means nothing", style="yellow")
    else:
        say(f"{weights or name}: {loaded.load_report}", style="dim")
    return loaded


def find_device(name: str):
    """The torch device of a name; ValueError where this machine does not have it."""
    import torch

    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: unknown device {name!r}; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def many_files(files: Sequence[str], out: Path | None, shard: str, workers, batch_size: int, root: str, questions=()):
    """The run over many files that the options ask for, or None; what does not fit is one line and status 2."""
    from mplug2.inference.command import ManyFiles
    from mplug2.inference.sources import is_many

    if out is None:
        folders = [file for file in files if is_many(file)]
        if folders:
            fail(f"{folders[0]}: holds many files; name a file for the results (--out results.jsonl)")
        if shard != "0/1" or workers or root:
            fail("--shard, --workers and --root go with --out")
        return None
    if not files:
        fail("--out: needs files, folders, lists or shards to read")
    return or_exit(lambda: ManyFiles(files, out, shard, workers, batch_size, root, tuple(questions), talk))


def print_each(files: Iterable[str], run: Callable[[str], list[dict]], key: str, as_json: bool) -> None:
    """Print the results of every file as they come; a file that cannot be read is reported and the others go on."""
    failed = False
    with Progress(console=talk, transient=True, disable=not talk.is_terminal) as progress:
        for file in progress.track(list(files), description=key):
            try:
                results = run(file)
            except ValueError as e:  # MediaError is one
                failed = True
                if as_json:
                    print(json.dumps({"file": file, "error": str(e)}), flush=True)
                else:
                    say(str(e), style="red")
                continue
            for result in results:
                print(json.dumps(result) if as_json else _line(result, key), flush=True)
    if failed:
        raise typer.Exit(1)


def say(text: str, style: str | None = None) -> None:
    talk.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _line(result: dict, key: str) -> str:
    return f"{result['file']}: {result[key]}"


def read_lines(path: Path) -> list[str]:
    lines = or_exit(lambda: path.read_text(encoding="utf-8").splitlines())
    choices = [line.strip() for line in lines if line.strip()]
    if not choices:
        fail(f"{path}: holds no answers; write one per line")
    return choices


def fail(text: str) -> NoReturn:
    """End with status 2 and one line."""
    say(text, style="red")
    raise typer.Exit(2)


def or_exit(run: Callable):
    """Run, or end with status 2 and the one line that says what does not fit."""
    try:
        return run()
    except (ValueError, OSError) as e:
        fail(str(e))
