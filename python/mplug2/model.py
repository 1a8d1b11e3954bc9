"""A task model: the parts of some tasks together with reading, tokenizing and generation."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from mplug2 import data
from mplug2.composition import Output, Parts, compose
from mplug2.config import PRESETS, ModelConfig, get_config
from mplug2.data.loading import equal_batches, read_ahead
from mplug2.data.text import Tokenizer
from mplug2.data.transform import Transform
from mplug2.quantization import DTYPES, FORMATS, quantize_int8
from mplug2.tasks import captioning, question_answering
from mplug2.weights import LoadReport, load_folder, load_released
from mplug2.weights.folder import VOCAB, WEIGHTS, save_folder
from mplug2.weights.hub import find_folder, push_folder

Result = TypeVar("Result")

PACKAGED = Path(__file__).parent / "presets"  # folders of models that ship with the package
FULL_VOCAB = Path(data.__file__).parent / "vocab" / VOCAB  # the 30,522 pieces of the released weights


class Model(nn.Module):
    """What `create_model` returns. `parts` are plain modules that never read files; this wrapper does."""

    def __init__(self, parts: Parts, tokenizer: Tokenizer, vocab_file: Path, report: LoadReport | None = None):
        super().__init__()
        self.parts = parts
        self.tokenizer = tokenizer
        self.vocab_file = vocab_file
        self.load_report = report  # None where the weights are random
        vision = parts.config.vision
        self.transform = Transform(vision.image_size, resize=vision.resize)

    @property
    def config(self):
        return self.parts.config

    def forward(self, **inputs) -> Output:
        """See `Parts.forward`."""
        return self.parts(**inputs)

    def caption(
        self, sources, *, return_scores: bool = False, num_captions: int = 1, batch_size: int = 8, **options
    ) -> str | tuple | list | Iterator:
        """Captions of videos or images.

        Args:
            sources: path, bytes or file object, a list of them, or a tensor (B, 3, T, H, W): uint8 frames of any size,
                or floating point as `transform` makes them. Any other iterable of such things, a generator or a data
                loader for instance, is read as it goes, a few batches ahead.
            return_scores: (caption, score) instead of the caption alone.
            num_captions: more than one gives a list per item, best first.
            batch_size: videos encoded together, and as many are decoded side by side.
            options: see `tasks.captioning.stream` (prompt, beam_size, min_length, max_length, decoding, ...).

        Returns:
            str for one source, list of str for several, for any other iterable a generator of str in its order. With
            several captions, a list of them for each.

        Raises:
            MediaError: a file cannot be read; the message names it.
        """
        options |= {"num_captions": num_captions, "task": self.first_task(captioning.TASKS)}
        visuals = self._visuals(sources, batch_size)
        found = captioning.stream(self.parts, self.tokenizer, visuals, batch_size=batch_size, **options)

        def captions() -> Iterator:
            for item in _in_order(found):
                pairs = item if return_scores else [text for text, _ in item]
                yield pairs if num_captions > 1 else pairs[0]

        return captions() if _is_stream(sources) else next(captions()) if _is_single(sources) else list(captions())

    def answer(
        self, sources, questions: str | Sequence[str], *, return_scores: bool = False, batch_size: int = 8, **options
    ) -> str | tuple | list | Iterator:
        """Answers to questions about videos or images.

        Args:
            sources: as for `caption`.
            questions: for one source, one or several questions about it; for several, one for all or one for each, and
                where sources is read as it goes questions may be any iterable too.
            batch_size: as for `caption`.
            options: see `tasks.question_answering.stream` (answers, ranking, beam_size, max_length, ...).

        Returns:
            str for one source and one question, a generator for an iterable that is read as it goes, else a list of
            str.
        """
        task = self.first_task(question_answering.TASKS)
        asked = [questions] if isinstance(questions, str) else questions
        visuals = self._visuals(sources, batch_size)
        if _is_single(sources):
            pairs = ((visual, question) for visual in visuals for question in asked)
        elif isinstance(questions, str):
            pairs = ((visual, questions) for visual in visuals)
        else:
            if not _is_stream(sources) and len(asked) not in (1, len(sources)):
                raise ValueError(
                    f"need one question, or one per source: {len(asked)} questions, {len(sources)} sources"
                )
            is_one = not _is_stream(sources) and len(asked) == 1
            pairs = zip(visuals, itertools.repeat(asked[0]) if is_one else asked, strict=not is_one)
        found = question_answering.stream(
            self.parts, self.tokenizer, pairs, batch_size=batch_size, task=task, **options
        )
        answers = (pair if return_scores else pair[0] for pair in _in_order(found))
        if _is_stream(sources):
            return answers
        return next(answers) if _is_single(sources) and isinstance(questions, str) else list(answers)

    @torch.no_grad()
    def encode_video(self, sources, *, normalize: bool = False, batch_size: int = 8) -> Tensor | Iterator[Tensor]:
        """Pooled features (B, D) of videos or images: class token after the universal layers.

        An iterable that is read as it goes (see `caption`) gives a generator of (D,).
        """
        self._needs("vision")

        def finish(pooled: Tensor) -> Tensor:
            return nn.functional.normalize(pooled, dim=-1) if normalize else pooled

        pooled = (finish(visual[0]) for visual in self._visuals(sources, batch_size))
        return pooled if _is_stream(sources) else torch.stack(list(pooled))

    encode_image = encode_video

    @torch.no_grad()
    def encode_text(self, texts: str | Sequence[str], *, normalize: bool = False) -> Tensor:
        """Pooled features (B, D) of texts: [CLS] after the universal layers; `normalize`: unit length."""
        self._needs("text")
        ids, mask = self.tokenizer(texts, max_length=self.config.text.max_positions)
        pooled = self.parts.encode_text(ids.to(self._device), mask.to(self._device))[:, 0]
        return nn.functional.normalize(pooled, dim=-1) if normalize else pooled

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """See `Parts.set_grad_checkpointing`."""
        self.parts.set_grad_checkpointing(enable)

    def read(self, source) -> Tensor:
        """One path, bytes or file object -> normalised frames (3, T, H, W); an image is one frame."""
        return data.load(source, self.transform, num_frames=self.config.vision.num_frames)[0]

    def save(self, folder: str | Path) -> None:
        """Write config.json, vocab.txt and model.safetensors; `create_model(folder)` reads them."""
        save_folder(self.parts, self.vocab_file, folder)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        task: str | Sequence[str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        quantize: str | None = None,
    ) -> Model:
        """`create_model` for what has weights: "nano", a folder (no network), or `owner/name` on the hub."""
        return create_model(name, revision=revision, task=task, device=device, dtype=dtype, quantize=quantize)

    def push_to_hub(self, repo_id: str, *, private: bool = False, commit_message: str | None = None) -> str:
        """Upload the folder that `save` writes to the Hugging Face hub as `owner/name`; returns its address."""
        return push_folder(self.parts, self.vocab_file, repo_id, private=private, commit_message=commit_message)

    @property
    def _device(self) -> torch.device:
        return next(self.parts.parameters()).device

    def encode_each(self, videos: Iterable[Tensor], batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """Visual tokens (K, D) of videos as they come, a batch of equal shape at a time, with their number from 0.

        videos: frames uint8 (T, size, size, 3) of the model's own size, or normalised (3, T, H, W).
        """
        p = next(self.parts.parameters())
        for batch in equal_batches(videos, batch_size, lambda video: (video.dtype, video.shape)):
            numbers, items = zip(*batch, strict=True)
            video = torch.stack(items).to(p.device)
            if not video.is_floating_point():
                frames = self.transform.normalize(video.flatten(0, 1))  # (3, B * T, size, size)
                video = frames.unflatten(1, video.shape[:2]).transpose(0, 1)
            with torch.no_grad():
                visual = self.parts.encode_vision(video.to(p.dtype))
            yield from zip(numbers, visual, strict=True)

    def _visuals(self, sources, batch_size: int) -> Iterator[Tensor]:
        """Visual tokens (K, D) of videos, in order; tensors in an iterable that is read as it goes are batches."""
        if not _is_stream(sources):
            yield from itertools.chain.from_iterable(self._encoded(sources, batch_size))
            return
        read = read_ahead(self._read_frames, sources, ahead=2 * batch_size)
        yield from _in_order(self.encode_each(itertools.chain.from_iterable(read), batch_size))

    def _read_frames(self, source) -> list[Tensor]:
        if not isinstance(source, Tensor):
            return [data.load_frames(source, self.transform, num_frames=self.config.vision.num_frames)]
        return list(self._checked(source))

    def _checked(self, videos: Tensor) -> Tensor:
        """A tensor of videos, normalised where it holds bytes."""
        if videos.dim() != 5 or videos.shape[1] != 3:
            raise ValueError(f"a tensor of videos must have shape (B, 3, T, H, W), got {tuple(videos.shape)}")
        if videos.is_floating_point():
            return videos
        return torch.stack([self.transform(video.permute(1, 2, 3, 0)) for video in videos])

    def _encoded(self, sources, batch_size: int) -> Iterator[Tensor]:
        """Visual tokens (B, K, D) of videos in order, a batch at a time."""
        for video in self._batches(sources, batch_size):
            with torch.no_grad():  # not round the yield: who takes the tokens may have gradients on
                visual = self.parts.encode_vision(video)
            yield visual

    def _batches(self, sources, batch_size: int) -> Iterator[Tensor]:
        """Normalised videos (B, 3, T, H, W) in order; frames of equal number share a batch."""
        p = next(self.parts.parameters())
        if isinstance(sources, Tensor):
            yield from self._checked(sources).to(p.device, p.dtype).split(batch_size)
            return
        batch: list[Tensor] = []
        for source in [sources] if _is_single(sources) else sources:
            if isinstance(source, Tensor):
                raise ValueError("tensors are taken as one batch (B, 3, T, H, W), not in a list: use torch.stack")
            video = self.read(source)
            if batch and (len(batch) == batch_size or video.shape != batch[0].shape):
                yield torch.stack(batch).to(p.device, p.dtype)
                batch = []
            batch.append(video)
        if batch:
            yield torch.stack(batch).to(p.device, p.dtype)

    def first_task(self, wanted: Sequence[str]) -> str:
        """The first of the model's tasks that is wanted; ValueError where there is none."""
        for task in self.parts.tasks:
            if task in wanted:
                return task
        raise ValueError(f"this model was made for {', '.join(self.parts.tasks)}; create it with task={wanted[0]!r}")

    def _needs(self, part: str) -> None:
        if getattr(self.parts, part) is None:
            raise ValueError(f"this model has no {part} encoder; its tasks are {', '.join(self.parts.tasks)}")


def list_models() -> list[str]:
    """The names that `create_model` knows without a folder."""
    return list(PRESETS)


def create_model(
    name: str | Path = "nano",
    *,
    revision: str | None = None,
    task: str | Sequence[str] | None = None,
    weights: str | Path | None = None,
    random_weights: bool = False,
    allow_missing: bool = False,
    instruction: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    quantize: str | None = None,
) -> Model:
    """A model ready to caption or answer, in eval mode.

    Args:
        name: "nano" (trained, ships with the package), "base", "large", a folder that `Model.save` wrote, or
            `owner/name` on the Hugging Face hub; what is on this machine is read without the network.
        revision: branch, tag or commit on the hub.
        task: one or several names of the composition table; None takes every task its config lists.
        weights: a released mPLUG2_*.pth, or a folder of our own format.
        random_weights: start at random instead.
        allow_missing: start parameters that the weights lack at random instead of raising WeightsError.
        instruction: captioning also reads an instruction (default: as the config says).
        quantize: "int8" rounds linear layers to 8 bits once they are loaded, on a CPU, for inference only; the rest,
            and what goes between layers, is of `dtype` (see `quantization.quantize_int8`).

    Raises:
        ValueError: no weights were named, or name, task or files do not fit. WeightsError names the file.
    """
    if random_weights and weights is not None:
        raise ValueError(f"weights={str(weights)!r} and random_weights=True exclude each other")
    if quantize is not None:
        _check_quantize(quantize, torch.device(device), dtype)
    folder, config = resolve(name, revision=revision)
    if weights is None and not random_weights and folder is None:
        raise ValueError(f"{name}: has no weights of its own; name a file (weights=...) or ask for random_weights=True")
    tasks = config.tasks if task is None else [task] if isinstance(task, str) else task
    parts = compose(tasks, config, instruction=instruction, device=device, dtype=dtype, init=random_weights)
    report = None
    source = folder if weights is None else Path(weights)
    if not random_weights:
        load = load_folder if source.is_dir() else load_released
        report = load(parts, source, device=device, allow_missing=allow_missing)
    if quantize is not None:
        quantize_int8(parts)
    vocabs = [place / VOCAB for place in (source, folder, PACKAGED / config.name) if place is not None]
    vocab = next((file for file in vocabs if file.is_file()), FULL_VOCAB)
    return Model(parts, _tokenizer(vocab, parts.config), vocab, report).eval()


def resolve(name: str | Path, *, revision: str | None = None) -> tuple[Path | None, ModelConfig]:
    """The folder that holds a model (None: a preset without weights) and its config."""
    if str(name) not in PRESETS:
        folder = find_folder(name, revision=revision)
        return folder, get_config(folder)
    if revision is not None:
        raise ValueError(f"{name}: is not on the hub and has no revision {revision!r}; leave revision out")
    folder = PACKAGED / str(name)
    return (folder, get_config(folder)) if (folder / WEIGHTS).is_file() else (None, PRESETS[str(name)])


def _check_quantize(quantize: str, device: torch.device, dtype: torch.dtype) -> None:
    """Before anything is read: a ValueError that says what does not fit."""
    if quantize not in FORMATS:
        raise ValueError(f"quantize must be None or {', '.join(map(repr, FORMATS))}, got {quantize!r}")
    if device.type != "cpu":
        raise ValueError(f"quantize={quantize!r} is for the CPU, got device {device}; leave quantize out there")
    if dtype not in DTYPES:
        raise ValueError(f"quantize={quantize!r} needs dtype float32, bfloat16 or float16, got {dtype}")


def _tokenizer(vocab: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a vocabulary that fits the model; another one would make it speak nonsense."""
    made = Tokenizer(vocab)
    if made.vocab_size != config.text.vocab_size:
        raise ValueError(f"{vocab}: {made.vocab_size} pieces, but the model's table has {config.text.vocab_size}")
    ids, wanted = (made.pad_id, made.start_id, made.end_id), (0, config.decoder.start_id, config.decoder.end_id)
    if ids != wanted:
        raise ValueError(f"{vocab}: [PAD], [CLS], [SEP] must be pieces {wanted} of this model, they are {ids}")
    return made


def _is_single(sources) -> bool:
    return isinstance(sources, (str, os.PathLike, bytes, bytearray)) or hasattr(sources, "read")


def _is_stream(sources) -> bool:
    return not (_is_single(sources) or isinstance(sources, (Tensor, list, tuple)))


def _in_order(found: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Results by their number, which counts from 0; those that come early wait."""
    early: dict[int, Result] = {}
    following = 0
    for number, result in found:
        early[number] = result
        while following in early:
            yield early.pop(following)
            following += 1
