"""Training: recipes, the optimizer, and runs that repeat and resume."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mplug2.composition import compose
from mplug2.config import PRESETS, DecoderConfig, FusionConfig, ModelConfig, TextConfig, UniversalConfig, VisionConfig
from mplug2.data.clothes.pictures import BUNDLED, read_pictures
from mplug2.data.clothes.scripts import write_scripts
from mplug2.data.idx import read_idx, write_idx
from mplug2.data.text import Tokenizer
from mplug2.model import PACKAGED
from mplug2.training import train as training
from mplug2.training.optim import Optimizer, cosine, hidden_matrices, orthogonalize
from mplug2.training.recipe import Recipe, Stage, read_recipe
from mplug2.training.step import Trainee, ask, encode_crops, encode_kept

ROOT = Path(__file__).parents[1]

TINY = ModelConfig(
    name="tiny",
    vision=VisionConfig(
        width=16, num_layers=1, num_heads=2, mlp_width=32, image_size=32, patch_size=8, patch_stride=4, num_frames=2,
        resize="area",
    ),
    text=TextConfig(vocab_size=2048, width=16, num_layers=1, num_heads=2, mlp_width=32, max_positions=16),
    universal=UniversalConfig(num_queries=2),
    fusion=FusionConfig(num_layers=1),
    decoder=DecoderConfig(num_layers=1, start_id=2, end_id=3),
    share_embeddings=True,
    tasks=("video-captioning", "image-captioning", "video-qa", "visual-qa"),
    prompt="",
)  # fmt: skip


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(TINY.to_json())
    (folder / "vocab.txt").write_text((PACKAGED / "nano" / "vocab.txt").read_text())
    return folder


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory):
    """The bundled test pictures under the names of the training split."""
    folder = tmp_path_factory.mktemp("pictures")
    for kind in ("images-idx3", "labels-idx1"):
        write_idx(folder / f"train-{kind}-ubyte.gz", read_idx(BUNDLED / f"t10k-{kind}-ubyte.gz"))
    return folder


def tiny_recipe(model_folder, **changes):
    rates = {"muon_lr": 0.01, "adamw_lr": 1e-3, "warmup_steps": 2, "batch_size": 4}
    stages = (
        Stage("crops", "crops", 16, **rates),
        Stage("stills", "stills", 8, **rates),
        Stage("clips", "clips", 16, still_batch_size=2, crop_batch_size=4, kept_patches=8, codec_share=0.5, **rates),
    )
    return Recipe(str(model_folder), stages, **{"num_processes": 1, "checkpoint_steps": 2, **changes})


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_nano_recipe_reads_and_covers_the_stages():
    recipe = read_recipe(ROOT / "recipes" / "nano.toml")
    assert recipe.model == "nano"
    assert recipe.stages[0].data == "crops"
    assert recipe.stages[-1].data == "clips"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 3", "model must be str"),
        ('model = "nano"', "at least one stage"),
        ('model = "nano"\nsteps = 3', "unknown name 'steps'"),
        ('model = "nano"\n[[stages]]\nname = "a"', "data is missing"),
        ("model = [", "not valid TOML"),
    ],
)
def test_bad_recipes_name_the_file_and_the_fault(tmp_path, text, message):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)


def test_batches_must_divide_over_processes(model_folder):
    with pytest.raises(ValueError, match="do not divide over 3 processes"):
        tiny_recipe(model_folder, num_processes=3)


def test_orthogonalize_levels_the_singular_values():
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 40), (40, 24)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_takes_hidden_matrices_only():
    names = set(hidden_matrices(Trainee(compose(TINY.tasks, TINY))))
    assert "parts.vision.patch_embedding.weight" in names
    assert "parts.decoder.layers.0.mlp.up.weight" in names
    assert not any("embeddings" in n or "norm" in n or "queries" in n for n in names)
    assert not any(".conv." in n for n in names)


def test_one_step_moves_every_parameter_by_its_rate():
    trainee = Trainee(compose(TINY.tasks, TINY))
    optimizer = Optimizer(trainee, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in trainee.named_parameters()}
    for p in trainee.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(0.1, 0.01)
    matrices = hidden_matrices(trainee)
    for name, p in trainee.named_parameters():
        moved = (p - before[name]).abs().mean().item()
        assert 0.002 < moved < 0.02 if name in matrices else moved == pytest.approx(0.01, rel=0.01), name


def test_packed_projections_are_orthogonalized_matrix_by_matrix():
    trainee = Trainee(compose(TINY.tasks, TINY))
    optimizer = Optimizer(trainee, weight_decay=0.0)
    weight = trainee.parts.vision.blocks[0].attention.qkv.weight
    before = weight.detach().clone()
    for p in trainee.parameters():
        p.grad = torch.randn_like(p)
    weight.grad[:16] *= 1000  # the queries' gradient must not drown the others
    optimizer.step(1.0, 0.0)
    sizes = (weight - before).view(3, -1).norm(dim=1)
    assert sizes.max() < 1.3 * sizes.min()


def test_the_learning_rate_warms_up_and_falls():
    factors = [cosine(i, 100, warmup_steps=10, final=0.1) for i in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[10] == 1.0
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_crops_at_one_place_equal_the_tower_on_the_whole_grid():
    """A crop as large as a frame, without local temporal modules, is encoded as the vision encoder would."""
    config = dataclasses.replace(TINY.vision, num_local_temporal=0)
    vision = compose(["video-captioning"], dataclasses.replace(TINY, vision=config)).vision
    margin = (config.patch_size - config.patch_stride) // 2
    video = torch.randn(2, 3, 1, 32, 32)
    padded = torch.nn.functional.pad(video, (margin,) * 4)
    whole = vision(video).mean(1)
    torch.testing.assert_close(encode_crops(vision, padded, np.random.default_rng(0)), whole)


def test_keeping_all_patches_changes_nothing_and_few_keep_the_moving_ones():
    vision = compose(["video-captioning"], TINY).vision
    video = torch.zeros(1, 3, 2, 32, 32)
    video[:, :, 1, 8:16, 8:16] = 1
    torch.testing.assert_close(encode_kept(vision, video, 64), vision(video))
    torch.testing.assert_close(encode_kept(vision, video, 0), vision(video))
    assert encode_kept(vision, video, 4).shape == (1, 1 + 2 * 4, 16)
    seen = video.clone().requires_grad_()
    encode_kept(vision, seen, 1)[:, 1:, 0].sum().backward()
    touched = seen.grad[0].abs().sum((0, 1)).nonzero()
    assert touched.min() >= 6
    assert touched.max() < 18


def test_questions_fit_their_answers():
    scripts = write_scripts(read_pictures(BUNDLED, "test"), 50, np.random.default_rng(0))
    questions, answers = ask(scripts, np.random.default_rng(1), num_questions=2)
    tokenizer = Tokenizer(PACKAGED / "nano" / "vocab.txt")
    assert {q.removesuffix("[SEP]").rstrip("?") for q in questions} == {"what is it", "what color is it"}
    for question, answer, (item, color, _) in zip(questions, answers, scripts.answers(), strict=True):
        assert answer == (color if "color" in question else item)
        assert tokenizer.unknown_id not in tokenizer.encode(question + answer)


def test_a_stopped_run_resumes_to_the_same_weights(tmp_path, model_folder, pictures_folder, monkeypatch):
    recipe = tiny_recipe(model_folder)
    whole = training.train(recipe, pictures_folder, tmp_path / "whole")
    assert [json.loads(line)["stage"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()] == [
        "crops", "stills", "clips",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="holds a run already"):
        training.train(recipe, pictures_folder, tmp_path / "whole")

    save, saved = training.save_checkpoint, []

    def save_then_stop(folder, state):
        save(folder, state)
        saved.append((state["stage"], state["step"]))
        if saved[-1] == (2, 2):
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        training.train(recipe, pictures_folder, tmp_path / "halves")
    monkeypatch.setattr(training, "save_checkpoint", save)
    resumed = training.train(recipe, pictures_folder, tmp_path / "halves", resume=True)
    assert saved[-1] == (2, 2)
    assert_same(weights_of(whole), weights_of(resumed))
    other = training.train(dataclasses.replace(recipe, seed=1), pictures_folder, tmp_path / "other")
    name = "vision.position_embedding"
    assert not torch.equal(weights_of(whole)[name], weights_of(other)[name])


def test_two_processes_share_a_batch(tmp_path, model_folder, pictures_folder):
    recipe = tiny_recipe(model_folder, num_processes=2)
    first = training.train(recipe, pictures_folder, tmp_path / "a")
    assert_same(weights_of(first), weights_of(training.train(recipe, pictures_folder, tmp_path / "b")))


def test_a_run_without_local_temporal_modules_starts_from_one_with_them(tmp_path, model_folder, pictures_folder):
    recipe = tiny_recipe(model_folder)
    recipe = dataclasses.replace(recipe, stages=recipe.stages[:1])
    first = training.train(recipe, pictures_folder, tmp_path / "a")
    blind = dataclasses.replace(
        recipe, start_from=str(first), without_local_temporal=True,
        stages=(dataclasses.replace(recipe.stages[0], num_samples=4, muon_lr=0.0, adamw_lr=0.0),),
    )  # fmt: skip
    second = weights_of(training.train(blind, pictures_folder, tmp_path / "b"))
    assert not any("local_temporal" in name for name in second)
    assert_same(second, {n: w for n, w in weights_of(first).items() if n in second})


def test_damaged_checkpoints_are_named(tmp_path, model_folder, pictures_folder):
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="nothing to resume"):
        training.train(tiny_recipe(model_folder), pictures_folder, tmp_path / "run", resume=True)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    with pytest.raises(ValueError, match="damaged checkpoint"):
        training.train(tiny_recipe(model_folder), pictures_folder, tmp_path / "run", resume=True)


def test_nano_is_small():
    parts = compose(PRESETS["nano"].tasks, "nano")
    assert sum(p.numel() for p in parts.parameters()) <= 4_000_000
    assert sum(p.numel() for p in parts.parameters()) * 2 <= 8.5e6
