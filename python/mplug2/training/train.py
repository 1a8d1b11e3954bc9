"""Training from a recipe: stages one after the other, in one or several processes of one thread each.

Every process draws its share of a batch from a generator seeded by (seed, stage, step, process), gradients are
averaged, and all processes then take the same step. So a run is decided by its recipe and can stop and go on at any
checkpoint.
Each stage ends with, and the next begins from, the running average of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mplug2._memory import return_free_memory
from mplug2.composition import compose
from mplug2.config import get_config
from mplug2.data.clothes.pictures import read_pictures
from mplug2.data.text import Tokenizer
from mplug2.model import FULL_VOCAB, PACKAGED
from mplug2.training.optim import Optimizer, cosine, sum_over_processes
from mplug2.training.recipe import Recipe
from mplug2.training.state import CHECKPOINT, load_checkpoint, save_checkpoint
from mplug2.training.step import Step, Trainee
from mplug2.weights.folder import VOCAB, WEIGHTS, SafetensorsFile, save_folder

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
_LOG_STEPS = 50


def train(recipe: Recipe, pictures: str | Path, out: str | Path, *, resume: bool = False) -> Path:
    """Run a recipe on the pictures in a folder of idx files; returns the model folder out/<last stage>.

    out gets a model folder after every stage, log.jsonl (losses and samples per second) and checkpoint.pt, from which
    `resume` goes on. ValueError when out already holds a run and resume is not asked for.
    """
    out = Path(out)
    read_pictures(pictures, "train")
    if (out / CHECKPOINT).exists() and not resume:
        raise ValueError(f"{out}: holds a run already; resume it or name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as meeting:
        context = multiprocessing.get_context("spawn")
        arguments = (recipe, Path(pictures), out, resume, Path(meeting) / "store")
        others = [context.Process(target=_run, args=(rank, *arguments)) for rank in range(1, recipe.num_processes)]
        for process in others:
            process.start()
        try:
            _run(0, *arguments)
            for process in others:
                process.join()
        finally:
            for process in others:
                process.kill()
    return out / recipe.stages[-1].name


def _run(rank: int, recipe: Recipe, pictures: Path, out: Path, resume: bool, store: Path) -> None:
    """One process of a run."""
    with _one_thread(), _process_group(rank, recipe.num_processes, store):
        _Run(rank, recipe, pictures, out, resume).go()


class _Run:
    def __init__(self, rank: int, recipe: Recipe, pictures: Path, out: Path, resume: bool):
        self.rank, self.recipe, self.out = rank, recipe, out
        config = get_config(recipe.model)
        if recipe.without_local_temporal:
            vision = dataclasses.replace(config.vision, num_local_temporal=0)
            config = dataclasses.replace(config, vision=vision)
        torch.manual_seed(recipe.seed)
        self.trainee = Trainee(compose(config.tasks, config))
        if recipe.start_from:
            _start_from(self.trainee.parts, Path(recipe.start_from))
        self.average = {n: p.detach().clone() for n, p in self.trainee.named_parameters()}
        folder = Path(recipe.model) if Path(recipe.model).is_dir() else PACKAGED / recipe.model
        self.vocab = folder / VOCAB if (folder / VOCAB).is_file() else FULL_VOCAB
        self.step = Step(recipe, self.trainee, Tokenizer(self.vocab), read_pictures(pictures, "train"))
        self.state = load_checkpoint(out) if resume else None

    def go(self) -> None:
        first, start = (self.state["stage"], self.state["step"]) if self.state else (0, 0)
        for index in range(first, len(self.recipe.stages)):
            self._stage(index, start if index == first else 0)

    def _stage(self, index: int, start: int) -> None:
        recipe, stage = self.recipe, self.recipe.stages[index]
        self.trainee.select(stage)
        self.optimizer = Optimizer(self.trainee, weight_decay=recipe.weight_decay)
        if self.state:
            self._restore(self.state)
        trained = [p for p in self.trainee.parameters() if p.requires_grad]
        began, logged = time.monotonic(), start
        with self._progress(stage.name, stage.num_steps, start) as advance:
            for step in range(start, stage.num_steps):
                rng = np.random.default_rng([recipe.seed, index, step, self.rank])
                losses = self.step.backward(stage, rng)
                sum_over_processes([p.grad for p in trained], 1 / recipe.num_processes)
                torch.nn.utils.clip_grad_norm_(trained, recipe.clip_norm, foreach=True)
                factor = cosine(step, stage.num_steps, warmup_steps=stage.warmup_steps, final=stage.final_lr)
                self.optimizer.step(factor * stage.muon_lr, factor * stage.adamw_lr)
                self.trainee.zero_grad()
                self._track(min(recipe.ema_decay, (1 + step) / (10 + step)))
                advance(losses)
                done = step + 1
                if done % _LOG_STEPS == 0 or done == stage.num_steps:
                    rate = (done - logged) * stage.batch_size / (time.monotonic() - began)
                    self._log({"stage": stage.name, "step": done, "samples_per_second": round(rate, 1), **losses})
                    # The heap comes to be full of holes between aligned blocks of many sizes: 5 MB more a step of
                    # clips, 16 GB and the end of the run after some hundred.
                    return_free_memory()
                    began, logged = time.monotonic(), done
                if done % recipe.checkpoint_steps == 0 and done < stage.num_steps:
                    self._save(index, done)
        for name, p in self.trainee.named_parameters():
            p.data.copy_(self.average[name])
        if self.rank == 0:
            save_folder(self.trainee.parts, self.vocab, self.out / stage.name)
        self.optimizer = None
        self._save(index + 1, 0)

    def _track(self, decay: float) -> None:
        names, values = zip(*((n, p.data) for n, p in self.trainee.named_parameters() if p.requires_grad), strict=True)
        torch._foreach_lerp_([self.average[n] for n in names], list(values), 1 - decay)

    def _save(self, stage: int, step: int) -> None:
        if self.rank == 0:
            optimizer = self.optimizer.state_dict() if self.optimizer else None
            save_checkpoint(
                self.out,
                {"stage": stage, "step": step, "weights": self.trainee.state_dict(), "average": self.average,
                 "optimizer": optimizer},
            )  # fmt: skip

    def _restore(self, state: dict) -> None:
        self.trainee.load_state_dict(state["weights"])
        for name, average in self.average.items():
            average.copy_(state["average"][name])
        if state["optimizer"]:
            self.optimizer.load_state_dict(state["optimizer"])
        self.state = None

    def _log(self, line: dict) -> None:
        if self.rank == 0:
            with open(self.out / LOG, "a") as f:
                f.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def _progress(self, name: str, num_steps: int, start: int) -> Iterator:
        """Shows a bar on rank 0; yields what is called after every step."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[loss]}"), disable=self.rank > 0) as bar:
            task = bar.add_task(name, total=num_steps, completed=start, loss="")
            yield lambda losses: bar.update(task, advance=1, loss=f"loss {sum(losses.values()):.3f}")


def _start_from(parts: torch.nn.Module, folder: Path) -> None:
    """Copy weights of a model folder; tensors that parts do not have are left out."""
    tensors = SafetensorsFile(folder / WEIGHTS)
    for name, p in parts.named_parameters():
        if name not in tensors:
            raise ValueError(f"{tensors.path}: lacks {name}; start from a folder of the same model")
        p.data.copy_(tensors[name])


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Two processes of one thread are 1.7 times as fast here as one process of two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _process_group(rank: int, size: int, store: Path) -> Iterator[None]:
    if size == 1:
        yield
        return
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
