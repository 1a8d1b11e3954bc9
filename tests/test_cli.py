"""The command line, as a user types it: stdout is data, stderr is talk, status says whether all went well."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from make_clips import make_video
from mplug2.cli import app


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(make_video(10))
    return str(path)


def run(*args):
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def test_caption_prints_one_json_line_per_file(clip):
    result = run("caption", "--json", "--random-weights", clip, clip)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 0
    assert [line["file"] for line in lines] == [clip, clip]
    assert set(lines[0]) == {"file", "caption", "score"}
    assert "untrained" in result.stderr


def test_a_bad_file_does_not_stop_the_others(clip, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_text("no video")
    result = run("caption", "--json", "--random-weights", clip, bad, clip)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.exit_code == 1
    assert [set(line) for line in lines] == [
        {"file", "caption", "score"},
        {"file", "error"},
        {"file", "caption", "score"},
    ]
    assert str(bad) in lines[1]["error"]


def test_options_that_exclude_each_other_are_an_error(clip):
    result = run("caption", "--random-weights", "--min-length", 30, clip)
    assert result.exit_code == 1
    assert "min_length <= max_length" in result.stderr


def test_plain_output_and_error_streams(clip, tmp_path):
    result = run("caption", "--random-weights", clip, tmp_path / "absent.mp4")
    assert result.exit_code == 1
    assert result.stdout.startswith(f"{clip}: ")
    assert len(result.stdout.splitlines()) == 1
    assert "absent.mp4" in result.stderr


def test_ask(clip, tmp_path):
    result = run("ask", "--json", "--random-weights", clip, "what is it?")
    assert result.exit_code == 0
    assert set(json.loads(result.stdout)) == {"file", "answer", "score"}
    (tmp_path / "answers.txt").write_text("bag\n\ncoat\n")
    result = run(
        "ask", "--json", "--random-weights", clip, "what is it?", "which?", "--answers", tmp_path / "answers.txt"
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["question"] for line in lines] == ["what is it?", "which?"]
    assert {line["answer"] for line in lines} <= {"bag", "coat"}
    args = ("ask", "--random-weights", clip, "what is it?", "--answers", tmp_path / "answers.txt")
    assert run(*args, "--ranking", "exact").stdout.strip() in (f"{clip}: bag", f"{clip}: coat")
    assert run(*args, "--ranking", "best").exit_code == 2


def test_seed_fixes_random_weights(clip):
    first, again, other = (run("caption", "--json", "--random-weights", "--seed", s, clip).stdout for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["caption", "--model", "large", "x.mp4"], "has no weights of its own"),
        (["caption", "--model", "nowhere", "x.mp4"], "nowhere"),
        (["caption", "--model", "large", "--weights", "absent.pth", "x.mp4"], "absent.pth: no such file"),
        (["convert", "absent.pth", "out"], "absent.pth: no such file"),
        (["ask", "x.mp4", "what?", "--answers", "absent.txt"], "absent.txt"),
        (["caption", "--random-weights", "--device", "gpu", "x.mp4"], "unknown device 'gpu'"),
        (["caption", "--random-weights", "--device", "cuda:77", "x.mp4"], "cuda:77 is not there"),
        (["draw", "out", "--pictures", "[/nowhere]"], "[/nowhere]"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_convert_writes_a_folder_that_captions(clip, tmp_path):
    import mplug2
    from mplug2.weights.names import old_names

    config = mplug2.config.PRESETS["nano"]
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes" / "config.json").write_text(config.to_json())
    shutil.copy(mplug2.model.PACKAGED / "nano" / "vocab.txt", tmp_path / "sizes")
    parts = mplug2.compose("video-captioning", config)
    state = {}
    for name, p in parts.named_parameters():
        names = old_names(name, num_text_layers=config.text.num_layers, fusion_start=0)
        state.update(zip(names, p.detach().chunk(len(names)), strict=True))
    torch.save({"model": state}, tmp_path / "released.pth")
    result = run("convert", tmp_path / "released.pth", tmp_path / "out", "--model", tmp_path / "sizes")
    assert result.exit_code == 0, result.stderr
    assert "0 ignored" in result.stderr
    assert run("caption", "--model", tmp_path / "out", clip).exit_code == 0
    assert run("embed", "--model", tmp_path / "out", clip).exit_code == 0


def test_installed_command_and_module_print_the_same_info():
    by_module = subprocess.run(
        [sys.executable, "-m", "mplug2.info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(by_module.stdout)["versions"]["torch"] == torch.__version__
    assert json.loads(run("info", "--json").stdout)["ops"] == json.loads(by_module.stdout)["ops"]


@pytest.mark.parametrize("command", ["caption", "ask", "embed", "convert", "draw", "train", "evaluate", "info"])
def test_help_has_examples(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"mplug2 {command}" in result.stdout


def test_embed_prints_features_of_files_and_texts(clip):
    result = run("embed", "--random-weights", "--normalize", clip, "--text", "a red bag")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [set(line) for line in lines] == [{"text", "embedding"}, {"file", "embedding"}]
    assert all(sum(x * x for x in line["embedding"]) == pytest.approx(1, abs=1e-4) for line in lines)
