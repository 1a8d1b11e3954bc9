"""Which frames are read: golden indices, and what is fixed or offered beyond them."""

import json
import random

import numpy as np
import pytest

from mplug2.data.sampling import (
    first_indices,
    fps_indices,
    frame_range,
    interval_indices,
    middle_indices,
    random_indices,
)


@pytest.fixture(scope="module")
def golden(parity_dir):
    return json.loads((parity_dir / "frame_indices.json").read_text())


class RecordedDraws:
    """The generators that the golden indices were drawn with."""

    def __init__(self, python_seed: int, numpy_seed: int) -> None:
        self.choice = random.Random(python_seed).choice
        self.permutation = np.random.RandomState(numpy_seed).permutation


def test_middle_equals_golden(golden):
    for case in golden["middle"]:
        assert middle_indices(0, case["total"], case["num_frames"]) == case["indices"], case


def test_first_equals_golden_within_the_clip(golden):
    for case in golden["fix_start"]:
        expected = [min(i, case["total"] - 1) for i in case["indices"]]
        assert first_indices(0, case["total"], case["num_frames"], offset=case["fix_start"]) == expected, case


def test_random_equals_golden(golden):
    for case in golden["rand"]:
        draws = RecordedDraws(case["python_seed"], case["numpy_seed"])
        assert random_indices(0, case["total"], case["num_frames"], draws) == case["indices"], case


def test_random_between_times_equals_golden(golden):
    for case in golden["start_end_rand"]:
        times = np.arange(case["total"]) / case["fps"]
        begin, end = frame_range(times, case["start_time"], case["end_time"])
        draws = RecordedDraws(case["python_seed"], case["numpy_seed"])
        assert random_indices(begin, end, case["num_frames"], draws) == case["indices"], case


def test_fps_equals_golden(golden):
    for case in golden["fps"]:
        times = np.arange(case["total"]) / case["input_fps"]
        limit = None if case["max_num_frames"] < 0 else case["max_num_frames"]
        fps = float(case["sample"].removeprefix("fps"))
        assert fps_indices(times, case["total"] / case["input_fps"], fps, limit) == case["indices"], case


def test_random_draws_every_frame_only_when_not_half_open():
    drawn = {half_open: set() for half_open in (True, False)}
    for half_open, seen in drawn.items():
        for seed in range(200):
            indices = random_indices(10, 26, 4, np.random.default_rng(seed), half_open=half_open)
            assert all(10 + 4 * i <= index < 14 + 4 * i for i, index in enumerate(indices))
            seen.update(indices)
    assert drawn[False] == set(range(10, 26))
    assert drawn[True] == set(range(10, 26)) - {13, 17, 21, 25}
    assert random_indices(0, 3, 5, np.random.default_rng(0), half_open=False) == [0, 1, 2, 2, 2]


def test_interval_is_centred_and_stays_inside():
    assert interval_indices(0, 100, 4, 10) == [34, 44, 54, 64]
    assert interval_indices(0, 31, 4, 10) == [0, 10, 20, 30]
    assert interval_indices(5, 20, 4, 10) == [5, 15, 19, 19]


def test_fps_follows_uneven_times():
    times = [0.0, 0.1, 0.9, 1.0, 1.4, 3.0]
    assert fps_indices(times, 4.0, 1.0) == [1, 4, 5, 5]  # 0.5 is nearer to 0.1 than to 0.9 by no more than a tie


def test_a_tie_goes_to_the_earlier_frame_whatever_the_rounding():
    assert fps_indices(np.arange(25, 50) / 25 - 1, 1.0, 5.0) == [2, 7, 12, 17, 22]
    assert frame_range([0.0, 0.1, 0.2, 0.3], None, 0.1 * 3) == (0, 3)


def test_frame_range_takes_the_frame_on_screen():
    times = np.array([0.0, 0.1, 0.5, 2.0])
    assert frame_range(times, None, None) == (0, 4)
    assert frame_range(times, 0.0, 0.1) == (0, 1)
    assert frame_range(times, 0.3, 0.5) == (1, 2)
    assert frame_range(times, 0.5, 1.0) == (2, 3)
    assert frame_range(times, 11 / 25, 99.0) == (1, 4)
    assert frame_range(np.arange(250) / 25, 2.2, 4.4) == (55, 110)
