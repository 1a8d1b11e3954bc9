"""The command line: results on stdout, talk on stderr, one bad file never stops the others."""

from __future__ import annotations

import json
import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.logging import RichHandler

from mplug2.tasks import captioning, question_answering
from mplug2.terminal import fail, load_model, many_files, or_exit, print_each, read_lines, say, talk

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    help="Caption and question videos and images with mPLUG-2.",
)  # fmt: skip


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(StrEnum):
    int8 = "int8"


class Ranking(StrEnum):
    released = "released"
    exact = "exact"


FILES = "Videos or images; with --out also folders, lists (*.txt, *.jsonl, -) and shards (*.tar)."
Files = Annotated[list[str], typer.Argument(help=FILES, show_default=False)]
ModelName = Annotated[str, typer.Option("--model", help="nano, base, large, or a model folder.")]
Weights = Annotated[str | None, typer.Option(help="A released mPLUG2_*.pth, or a model folder.", show_default=False)]
RandomWeights = Annotated[bool, typer.Option("--random-weights", help="Untrained weights, to try speed and memory.")]
Seed = Annotated[int, typer.Option(help="Seed of random weights and of sampling.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of weights and activations.")]
QuantizeOption = Annotated[Quantize | None, typer.Option(help="8-bit linear layers, on a CPU.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per line.")]
Out = Annotated[
    Path | None, typer.Option(help="JSONL file to append to; run again, it goes on there.", show_default=False)
]
Shard = Annotated[str, typer.Option(help="i/n: only part i (from 0) of n, into FILE.i-of-n.jsonl.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Decoding processes [default: one a core].")]
BatchSize = Annotated[int, typer.Option(min=1, help="Videos the model takes at once, with --out.")]
Root = Annotated[str, typer.Option(help="Folder that paths in a list start from.", show_default=False)]


@app.callback()
def main_options(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on stderr.")] = False) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=talk, show_path=False, show_time=False)],
    )


@app.command()
def caption(
    files: Files,
    model: ModelName = "nano",
    weights: Weights = None,
    random_weights: RandomWeights = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.float32,
    quantize: QuantizeOption = None,
    prompt: Annotated[str, typer.Option(help="Words every caption starts with.")] = "",
    num_captions: Annotated[int, typer.Option(min=1, help="Captions per file, best first.")] = 1,
    beam_size: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")] = 5,
    min_length: Annotated[int, typer.Option(min=0, help="Word pieces at least.")] = 4,
    max_length: Annotated[int, typer.Option(min=1, help="Word pieces at most.")] = 20,
    as_json: AsJson = False,
    out: Out = None,
    shard: Shard = "0/1",
    workers: Workers = None,
    batch_size: BatchSize = 8,
    root: Root = "",
) -> None:
    """Caption videos and images: a few, or with --out any number, in a run that may be killed and run again.

    Examples:

    `mplug2 caption clip.mp4`

    `mplug2 caption --json --model large --weights mPLUG2_MSRVTT_Caption.pth *.mp4 > captions.jsonl`

    `mplug2 caption videos/ --out captions.jsonl`

    `find videos -name "*.mp4" | mplug2 caption - --out captions.jsonl`

    `torchrun --nproc-per-node 8 -m mplug2.cli caption "shards/{000..099}.tar" --out captions.jsonl`
    """
    many = many_files(files, out, shard, workers, batch_size, root)
    loaded = load_model(model, captioning.TASKS, weights, random_weights, seed, device, dtype, quantize)
    options = {"prompt": prompt, "beam_size": beam_size, "min_length": min_length, "max_length": max_length}
    if many:
        raise typer.Exit(many.caption(loaded, num_captions=num_captions, **options))

    def run(file: str) -> list[dict]:
        found = loaded.caption([file], return_scores=True, num_captions=num_captions, **options)[0]
        found = found if num_captions > 1 else [found]
        return [{"file": file, "caption": text, "score": score} for text, score in found]

    print_each(files, run, "caption", as_json)


@app.command()
def ask(
    file: Annotated[
        str, typer.Argument(help="A video or an image; with --out also a folder, a list or shards.", show_default=False)
    ],
    questions: Annotated[
        list[str] | None,
        typer.Argument(help="One or several questions; none where a list asks its own.", show_default=False),
    ] = None,
    model: ModelName = "nano",
    weights: Weights = None,
    random_weights: RandomWeights = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.float32,
    quantize: QuantizeOption = None,
    answers: Annotated[
        Path | None, typer.Option(help="A text file with one answer per line to choose from.", show_default=False)
    ] = None,
    ranking: Annotated[
        Ranking, typer.Option(help="Of --answers: compare those of likely first piece (released), or all (exact).")
    ] = Ranking.released,
    as_json: AsJson = False,
    out: Out = None,
    shard: Shard = "0/1",
    workers: Workers = None,
    batch_size: BatchSize = 8,
    root: Root = "",
) -> None:
    """Answer questions about a video or an image, or with --out about any number of them.

    Examples:

    `mplug2 ask clip.mp4 "what is it?" "what does it do?"`

    `mplug2 ask --json --model large --weights mPLUG2_MSRVTT_QA.pth clip.mp4 "who is singing?" --answers answers.txt`

    `mplug2 ask videos/ "what is it?" --out answers.jsonl`

    `mplug2 ask questions.jsonl --root videos --out answers.jsonl` (lines {"file": ..., "question": ...})
    """
    questions = questions or []
    many = many_files([file], out, shard, workers, batch_size, root, questions)
    if not questions and not (many and many.has_list):
        fail("ask: needs a question, or a *.jsonl list whose lines hold one")
    choices = read_lines(answers) if answers else None
    loaded = load_model(model, question_answering.TASKS, weights, random_weights, seed, device, dtype, quantize)
    if many:
        raise typer.Exit(many.answer(loaded, answers=choices, ranking=ranking))

    def run(file: str) -> list[dict]:
        found = loaded.answer(file, questions, return_scores=True, answers=choices, ranking=ranking)
        asked = [{"question": question} if len(questions) > 1 else {} for question in questions]
        return [
            {"file": file, **question, "answer": answer, "score": score}
            for question, (answer, score) in zip(asked, found, strict=True)
        ]

    print_each([file], run, "answer", as_json)


@app.command()
def embed(
    files: Annotated[list[str] | None, typer.Argument(help=FILES, show_default=False)] = None,
    texts: Annotated[list[str] | None, typer.Option("--text", help="A text to embed.", show_default=False)] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Unit length.")] = False,
    model: ModelName = "nano",
    weights: Weights = None,
    random_weights: RandomWeights = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.float32,
    out: Out = None,
    shard: Shard = "0/1",
    workers: Workers = None,
    batch_size: BatchSize = 8,
    root: Root = "",
) -> None:
    """Pooled features of videos, images and texts, one JSON object per line; with --out a matrix in FILE.npy, and FILE
    says which row is whose.

    Examples:

    `mplug2 embed --normalize clip.mp4 --text "a red sneaker" > features.jsonl`

    `mplug2 embed --normalize videos/ --out features.jsonl` (and features.npy)
    """
    many = many_files(files or (), out, shard, workers, batch_size, root)
    if many and texts:
        fail("embed: --text and --out exclude each other; print the features of texts in a run of their own")
    loaded = load_model(model, ["feature-extraction"] if texts else None, weights, random_weights, seed, device, dtype)
    if many:
        raise typer.Exit(many.embed(loaded, normalize=normalize))

    def run(file: str) -> list[dict]:
        return [{"file": file, "embedding": loaded.encode_video(file, normalize=normalize)[0].tolist()}]

    for text in texts or ():
        features = loaded.encode_text(text, normalize=normalize)[0].tolist()
        print(json.dumps({"text": text, "embedding": features}), flush=True)
    print_each(files or (), run, "embedding", as_json=True)


@app.command()
def convert(
    released: Annotated[Path, typer.Argument(help="A released mPLUG2_*.pth.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="The model folder to write.", show_default=False)],
    model: Annotated[str, typer.Option("--model", help="Its sizes: base, large, or a config.json.")] = "large",
    task: Annotated[list[str] | None, typer.Option(help="Its tasks [default: video-captioning].")] = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Turn a released checkpoint into a model folder (config.json, vocab.txt, model.safetensors).

    Example:

    `mplug2 convert mPLUG2_MSRVTT_QA.pth msrvtt-qa --task video-qa --dtype bfloat16`
    """
    import torch

    from mplug2.model import create_model

    loaded = or_exit(
        lambda: create_model(
            model, task=task or ["video-captioning"], weights=released, dtype=getattr(torch, dtype.value)
        )
    )
    say(f"{released}: {loaded.load_report}")
    or_exit(lambda: loaded.save(folder))
    say(f"wrote {folder}")


PICTURES = "Folder of the Fashion-MNIST idx files; Debian has them in the package dataset-fashion-mnist."


@app.command()
def draw(
    folder: Annotated[Path, typer.Argument(help="The data folder to write.", show_default=False)],
    pictures: Annotated[Path, typer.Option(help=PICTURES, show_default=False)],
    num_clips: Annotated[int, typer.Option(min=1, help="Clips to draw.")] = 1000,
    split: Annotated[str, typer.Option(help="Pictures to draw from: train or test.")] = "test",
    triples: Annotated[str, typer.Option(help="Item, color and motion together: all, trained or untrained.")] = "all",
    seed: Annotated[int, typer.Option(help="Decides every clip.")] = 0,
) -> None:
    """Draw clips of moving clothes: mp4 files, captions.jsonl and answers.jsonl, as `mplug2 evaluate` reads them.

    Example:

    `mplug2 draw clips --pictures /usr/share/datasets/fashion-mnist --num-clips 1000`
    """
    from mplug2.data.clothes.folder import write_folder

    options = {"split": split, "triples": triples, "num_clips": num_clips, "seed": seed}
    or_exit(lambda: write_folder(folder, pictures, **options))
    say(f"wrote {folder}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/nano.toml.", show_default=False)],
    pictures: Annotated[Path, typer.Option(help=PICTURES, show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for models, log and checkpoint.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
) -> None:
    """Train a model by a recipe; the same recipe and pictures give the same weights.

    Example:

    `mplug2 train recipes/nano.toml --pictures /usr/share/datasets/fashion-mnist --out runs/nano`
    """
    from mplug2.training.recipe import read_recipe
    from mplug2.training.train import train as run

    folder = or_exit(lambda: run(read_recipe(recipe), pictures, out, resume=resume))
    say(f"wrote {folder}; try it: mplug2 caption --model {folder} clip.mp4")


@app.command()
def evaluate(
    task: Annotated[str, typer.Argument(help="video-captioning or video-qa.", show_default=False)],
    folder: Annotated[Path, typer.Argument(help="Videos with captions.jsonl or answers.jsonl.", show_default=False)],
    metric: Annotated[str | None, typer.Option(help="accuracy or clothes.", show_default=False)] = None,
    predictions: Annotated[Path | None, typer.Option(help="JSONL file to write them to.", show_default=False)] = None,
    model: ModelName = "nano",
    weights: Weights = None,
    device: Device = "auto",
    dtype: DtypeOption = Dtype.float32,
    quantize: QuantizeOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model on a folder of videos.

    Example:

    `mplug2 evaluate video-captioning clips --predictions captions.jsonl`
    """
    from mplug2.evaluation.run import evaluate as measure

    loaded = load_model(model, [task], weights, False, 0, device, dtype, quantize)
    options = {"metric": metric, "predictions": predictions, "progress": talk.is_terminal}
    shares = or_exit(lambda: measure(loaded, task, folder, **options))
    if as_json:
        print(json.dumps({name: {"right": share.right, "of": share.of} for name, share in shares.items()}))
        return
    for name, share in shares.items():
        if share.of:
            print(f"{name}: {share.value:.1%} of {share.of}")


@app.command()
def info(
    as_json: AsJson = False,
    explain: Annotated[bool, typer.Option("--explain", help="Every CUDA kernel: does it serve, and why.")] = False,
) -> None:
    """Versions, CPU, devices, compiled libraries, and which layer each op would run in.

    Examples:

    `mplug2 info --json`

    `mplug2 info --explain`
    """
    from mplug2 import info as facts

    facts.show(as_json=as_json, explain=explain)


@app.command()
def doctor(
    as_json: AsJson = False,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be repeated.", show_default=False)] = None,
    write: Annotated[
        Path | None, typer.Option(help="File to add the records to, instead of this user's.", show_default=False)
    ] = None,
) -> None:
    """Prove the CUDA kernels on this machine's GPU, and record what passed: it serves from then on.

    Example:

    `mplug2 doctor`
    """
    from mplug2 import doctor as proving

    proving.doctor(as_json=as_json, op=op, write=write)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
