"""The moving-clothes data: scripts, drawing, files."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from mplug2.config import PRESETS
from mplug2.data import read_clip
from mplug2.data.clothes import batches
from mplug2.data.clothes.drawing import draw
from mplug2.data.clothes.folder import draw_file, write_folder
from mplug2.data.clothes.pictures import BUNDLED, ITEMS, read_pictures
from mplug2.data.clothes.scripts import (
    CANVAS,
    COLORS,
    MOTIONS,
    QUESTIONS,
    REVERSED,
    TRIPLES,
    parse_caption,
    write_scripts,
)
from mplug2.data.idx import read_idx, write_idx


@pytest.fixture(scope="module")
def pictures():
    return read_pictures(BUNDLED, "test")


def scripts_of(pictures, count=2000, seed=0, triples="all"):
    return write_scripts(pictures, count, np.random.default_rng(seed), triples)


def test_bundled_pictures_hold_every_item(pictures):
    assert pictures.pixels.shape == (400, 28, 28)
    assert np.bincount(pictures.items).tolist() == [40] * len(ITEMS)


def test_idx_files_round_trip_and_damage_is_named(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "a.gz"
    write_idx(path, array)
    assert np.array_equal(read_idx(path), array)
    whole = path.read_bytes()
    write_idx(path, array)
    assert path.read_bytes() == whole
    for damaged in (whole[:-9], b"", b"\0\0\x08\x01\0\0\0\x05abc", b"\0\0\x0d\x01\0\0\0\0", b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.gz"):
            read_idx(path)


def test_pictures_say_how_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="apt-get download dataset-fashion-mnist"):
        read_pictures(tmp_path, "train")


def test_a_tenth_of_the_triples_is_untrained_and_closed_under_reversal():
    total = len(ITEMS) * len(COLORS) * len(MOTIONS)
    untrained = {tuple(t) for t in TRIPLES["untrained"].tolist()}
    assert (len(TRIPLES["all"]), len(untrained), len(TRIPLES["trained"])) == (total, total // 10, total - total // 10)
    assert {(i, c, REVERSED[m]) for i, c, m in untrained} == untrained
    for column, names in enumerate((ITEMS, COLORS, MOTIONS)):
        counts = np.bincount(TRIPLES["untrained"][:, column], minlength=len(names))
        assert counts.min() > 0
        assert len({t[column] for t in TRIPLES["trained"].tolist()}) == len(names)


def test_scripts_keep_to_the_rules(pictures):
    scripts = scripts_of(pictures, triples="trained")
    start, end = scripts.path[:, 0], scripts.path[:, 1]
    motion = np.array(MOTIONS)[scripts.motion]
    shift, growth = end[:, :2] - start[:, :2], end[:, 2] / start[:, 2]
    for name, axis, sign in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        moved = shift[motion == f"moves {name}"]
        assert (sign * moved[:, axis] >= CANVAS / 3).all()
        assert (moved[:, 1 - axis] == 0).all()
    assert (growth[motion == "grows"] >= 1.6).all()
    assert (growth[motion == "shrinks"] <= 1 / 1.6).all()
    assert (abs(end[:, 3] - start[:, 3])[motion == "spins"] >= np.pi).all()
    assert (start == end)[motion == "stays still"].all()
    assert scripts.path[:, :, 2].min() >= 40
    assert scripts.path[:, :, 2].max() <= 64
    for state in (start, end):
        assert (state[:, :2] - state[:, 2:3] / 2 >= -1e-9).all()
        assert (state[:, :2] + state[:, 2:3] / 2 <= CANVAS + 1e-9).all()
    assert set(scripts.num_frames.tolist()) == set(range(16, 49))
    assert (scripts.fps.min(), scripts.fps.max()) == (8, 30)
    assert (pictures.items[scripts.picture] == scripts.item).all()
    untrained = {tuple(t) for t in TRIPLES["untrained"].tolist()}
    assert not untrained & set(zip(scripts.item.tolist(), scripts.color.tolist(), scripts.motion.tolist(), strict=True))


def test_a_reversed_script_draws_the_same_frames_backwards(pictures):
    scripts = scripts_of(pictures, 16)
    at = np.broadcast_to(np.linspace(0, 1, 5), (16, 5))
    forwards, backwards = draw(scripts, pictures, at, size=64), draw(scripts.reversed(), pictures, at, size=64)
    torch.testing.assert_close(backwards, forwards.flip(2), rtol=0, atol=1e-4)
    assert scripts.reversed().captions() == [
        c.replace(MOTIONS[m], MOTIONS[REVERSED[m]]) for c, m in zip(scripts.captions(), scripts.motion, strict=True)
    ]


def test_paths_and_their_reversals_are_drawn_equally_often(pictures):
    """Which way a path is played must not show in anything else: every feature of it, and of its reversal, has the same
    distribution. Compared by the means of features of (start, end), in standard errors."""
    scripts = scripts_of(pictures, 40_000)
    for motion in range(len(MOTIONS)):
        there = scripts[scripts.motion == motion].path
        back = scripts[scripts.motion == REVERSED[motion]].path[:, ::-1]
        assert abs(len(there) / len(scripts) - 1 / 8) < 0.01
        for of in (lambda p: p, lambda p: p**2, lambda p: p[:, :1] * p[:, 1:], lambda p: abs(p[:, 1] - p[:, 0])):
            a, b = of(there), of(back)
            error = np.sqrt(a.var(0) / len(a) + b.var(0) / len(b))
            assert (abs(a.mean(0) - b.mean(0)) <= 5 * error + 1e-9).all(), MOTIONS[motion]


def test_the_same_seed_draws_the_same_scripts(pictures):
    a, b, c = (scripts_of(pictures, 10, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    assert not np.array_equal(a.path, c.path)


def test_small_frames_are_the_mean_of_large_ones(pictures):
    scripts = scripts_of(pictures, 4)
    at = np.full((4, 1), 0.5)
    large, small = draw(scripts, pictures, at)[:, :, 0], draw(scripts, pictures, at, size=64)[:, :, 0]
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(large, 2), small, rtol=0, atol=0.02)


def test_items_stand_out_in_their_color(pictures):
    scripts = scripts_of(pictures, 200)
    x, y = (scripts.path[:, 0, i].astype(int) for i in (0, 1))
    frames = draw(scripts, pictures, np.zeros((200, 1)))[:, :, 0].numpy()
    patch = np.stack([f[:, b - 9 : b + 9, a - 9 : a + 9].reshape(3, -1) for f, a, b in zip(frames, x, y, strict=True)])
    strongest = np.take_along_axis(patch, np.ptp(patch, axis=1).argmax(1)[:, None, None], 2)[:, :, 0]
    for channel, color in enumerate(("red", "green", "blue")):
        of = strongest[scripts.color == COLORS.index(color)]
        assert np.mean(of.argmax(1) == channel) > 0.9


def test_crops_hold_the_whole_item(pictures):
    config = PRESETS["nano"].vision
    batch = batches.crops(pictures, 8, config, np.random.default_rng(0))
    assert batch.video.shape == (8, 3, 1, 40, 40)
    assert len(batch.scripts) == 8


def test_drawn_clips_match_coded_clips(pictures):
    config = PRESETS["nano"].vision
    drawn, coded = (
        batches.clips(pictures, 4, config, np.random.default_rng(0), codec_share=share).video for share in (0.0, 1.0)
    )
    assert drawn.shape == coded.shape == (4, 3, config.num_frames, 64, 64)
    assert (drawn - coded).abs().mean() < 0.15  # compression, in standard deviations of the pixels
    shifted = drawn.roll(1, 2)
    assert (shifted - coded).abs().mean() > (drawn - coded).abs().mean()


def test_files_are_h264_of_the_scripts_length_and_rate(pictures):
    script = scripts_of(pictures, 1)
    file = draw_file(script, pictures)
    assert file == draw_file(script, pictures)
    clip = read_clip(file, num_frames=int(script.num_frames[0]))
    assert clip.num_total == script.num_frames[0]
    assert clip.frames.shape[1:] == (CANVAS, CANVAS, 3)
    assert clip.times[-1] == pytest.approx((clip.num_total - 1) / script.fps[0], abs=1e-3)


def test_folders_hold_clips_captions_and_answers(tmp_path, pictures):
    write_folder(tmp_path / "a", BUNDLED, num_clips=3, seed=5, triples="untrained")
    captions = [json.loads(line) for line in (tmp_path / "a" / "captions.jsonl").read_text().splitlines()]
    answers = [json.loads(line) for line in (tmp_path / "a" / "answers.jsonl").read_text().splitlines()]
    assert [c["video"] for c in captions] == ["0000.mp4", "0001.mp4", "0002.mp4"]
    assert [a["question"] for a in answers[:3]] == list(QUESTIONS)
    for i, caption in enumerate(captions):
        assert (tmp_path / "a" / caption["video"]).stat().st_size > 1000
        assert parse_caption(caption["caption"]) == tuple(a["answer"] for a in answers[3 * i : 3 * i + 3])
    with pytest.raises(FileExistsError):
        write_folder(tmp_path / "a", BUNDLED, num_clips=1)


def test_captions_parse_back(pictures):
    scripts = scripts_of(pictures, 50)
    assert [parse_caption(c) for c in scripts.captions()] == scripts.answers()
    assert parse_caption("a red t - shirt moves left") == ("t-shirt", "red", "moves left")
    assert parse_caption("a dog") == (None, None, None)
