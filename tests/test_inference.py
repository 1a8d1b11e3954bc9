"""Runs over many files: found lazily, read by processes, written once each, whatever is killed on the way."""

import contextlib
import gc
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import mplug2
from hostile import DIES, HANGS, HostileTransform
from make_clips import make_video
from mplug2.cli import app
from mplug2.data import MediaError, Transform
from mplug2.data.loading import equal_batches, read_ahead
from mplug2.inference import Answering, Captioning, Embedding, FeaturesFile, ResultsFile, Share, find_items, run
from mplug2.inference.reading import Reader
from mplug2.inference.sources import Item, expand_braces


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mplug2.create_model("nano", random_weights=True)


@pytest.fixture(scope="module")
def clip():
    return make_video(8)


@pytest.fixture
def folder(tmp_path, clip):
    """12 files: 10 clips, one that is text and one that is cut short."""
    place = tmp_path / "clips"
    (place / "b").mkdir(parents=True)
    for i in range(10):
        (place / ("b" if i > 5 else "") / f"{i}.mp4").write_bytes(clip)
    (place / "text.mp4").write_text("no video\n")
    (place / "b" / "cut.mp4").write_bytes(clip[:300])
    return place


SHORT = ("--beam-size", "2", "--min-length", "0", "--max-length", "4")  # captions, for tests that are not about them


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def command(*args):
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# ---- sources ----


def test_a_folder_gives_its_media_by_name(folder):
    (folder / ".hidden.mp4").write_bytes(b"x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "a.mp4").write_bytes(b"x")
    (folder / "notes.md").write_text("x")
    (folder / "loop").symlink_to(folder)
    names = [os.path.relpath(item.name, folder) for item in find_items([str(folder)])]
    assert names == ["0.mp4", "1.mp4", "2.mp4", "3.mp4", "4.mp4", "5.mp4", "b/6.mp4", "b/7.mp4", "b/8.mp4", "b/9.mp4",
                     "b/cut.mp4", "text.mp4"]  # fmt: skip


def test_a_folder_is_not_listed_before_it_is_walked(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.mp4").write_bytes(b"x")
    items = find_items([str(tmp_path)])
    assert next(items).name == str(tmp_path / "a" / "1.mp4")
    (tmp_path / "b" / "2.mp4").write_bytes(b"x")
    assert len(list(items)) == 2


def test_lists_name_files_as_they_are_written(tmp_path):
    text = 'a b.mp4\n\n{"video": "c.mp4", "caption": "x"}\r\n{"file": "d.mp4", "question": "what?"}\n'
    text += '{"file": "d.mp4", "question": "who?"}\n{"video_id": "e.mp4", "question": "what?"}\n'
    (tmp_path / "list.jsonl").write_text(text)
    items = list(find_items([str(tmp_path / "list.jsonl")], questions=["how?"], root="videos"))
    assert items == [
        Item("a b.mp4", "videos/a b.mp4", ("how?",)),
        Item("c.mp4", "videos/c.mp4", ("how?",)),
        Item("d.mp4", "videos/d.mp4", ("what?", "who?")),
        Item("e.mp4", "videos/e.mp4", ("what?",)),
    ]


def test_a_list_is_read_line_by_line(monkeypatch):
    def endless():
        for i in range(10):
            yield f"{i}.mp4\n"
        raise AssertionError("was read ahead")

    monkeypatch.setattr(sys, "stdin", endless())
    assert [item.name for item in islice(find_items(["-"]), 10)] == [f"{i}.mp4" for i in range(10)]


@pytest.mark.parametrize("line", ['{"file": 3}', '{"file": "a.mp4", "question": 3}', "{not json"])
def test_a_line_that_does_not_fit_is_named(tmp_path, line):
    (tmp_path / "list.jsonl").write_text(f"a.mp4\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.jsonl:2: "):
        list(find_items([str(tmp_path / "list.jsonl")]))


def test_standard_input_may_name_files_in_any_bytes(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.mp4\n"), encoding="utf-8"))
    assert [os.fsencode(item.source) for item in find_items(["-"])] == [b"caf\xe9.mp4"]


def test_braces():
    assert list(expand_braces("a{08..10}-{x,y}.tar")) == [f"a{i}-{s}.tar" for i in ("08", "09", "10") for s in "xy"]
    assert list(expand_braces("awk '{print}' {3..4}")) == ["awk '{print}' 3", "awk '{print}' 4"]
    assert next(expand_braces("{0..999999999999}.tar")) == "0.tar"  # lazily


@pytest.mark.parametrize("kind", ["path", "pipe", "http"])
def test_shards_are_streamed(tmp_path, kind):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {f"{i}/a.mp4": b"A" * 9000, f"{i}/a.json": b"{}", f"{i}/b.JPG": b"B"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shards = {
        "path": f"{tmp_path}/{{0..1}}.tar",
        "pipe": f"pipe:cat {tmp_path}/{{0..1}}.tar",
        "http": f"http://127.0.0.1:{server.server_port}/{{0..1}}.tar?x=1",
    }[kind]
    items = list(find_items([shards]))
    server.shutdown()
    server.server_close()
    names = [f"{shard}/{i}/{name}" for i, shard in enumerate(expand_braces(shards)) for name in ("a.mp4", "b.JPG")]
    assert [item.name for item in items] == names
    assert [item.source for item in items] == [b"A" * 9000, b"B"] * 2
    assert not any(item.error for item in items)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_a_shard_that_breaks_is_an_error_and_the_others_go_on(tmp_path):
    write_tar(tmp_path / "0.tar", {"a.mp4": b"A" * 2000, "b.mp4": b"B" * 20000})
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:9000])
    write_tar(tmp_path / "2.tar", {"c.mp4": b"C"})
    pipe = f"pipe:cd {tmp_path}; cat 2.tar; exit 3"
    items = list(find_items([f"{tmp_path}/{{0..2}}.tar", pipe]))
    assert [item.error is None for item in items] == [True, False, False, True, True, False]
    names = [item.name.removeprefix(f"{tmp_path}/") for item in items]
    assert names == ["0.tar/a.mp4", "0.tar", "1.tar", "2.tar/c.mp4", f"{pipe}/c.mp4", pipe]
    assert all(item.error.startswith(item.name) for item in items if item.error)


def test_an_address_that_cannot_be_is_an_error_of_its_shard():
    (item,) = find_items(["http://127.0.0.1:1/a b.tar"])
    assert item.error.startswith("http://127.0.0.1:1/a b.tar: ")


def test_shares_part_the_items_exactly(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4\n" for i in range(300)))
    for i in range(9):
        write_tar(tmp_path / f"{i}.tar", {"a.mp4": b"A", "b.mp4": b"B"})
    sources = [str(tmp_path / "list.txt"), f"{tmp_path}/{{0..8}}.tar"]
    whole = sorted(item.name for item in find_items(sources))
    shares = [Share(i, 3).split(j, 2) for i in range(3) for j in range(2)]
    parts = [[item.name for item in find_items(sources, share=share)] for share in shares]
    assert sorted(name for part in parts for name in part) == whole
    assert all(len(part) > 20 for part in parts)
    for part in parts:  # shards are not opened by several
        of_shards = [name for name in part if ".tar/" in name]
        assert len({name.rsplit("/", 1)[0] for name in of_shards}) * 2 == len(of_shards)


@pytest.mark.parametrize("text", ["3/3", "a/b", "1", "-1/2"])
def test_a_share_that_is_none(text):
    with pytest.raises(ValueError, match="--shard"):
        Share.parse(text)


# ---- results ----


def test_a_torn_line_is_cut_and_nothing_is_done_twice(tmp_path):
    path = tmp_path / "out.jsonl"
    with ResultsFile(path) as results:
        assert results.claim("a")
        assert not results.claim("a")
        assert results.claim("a", "what?")
        results.write("a", caption="x")
        results.write("b\udcff", "what?", error="b: bad")
    whole = path.read_bytes()
    for torn in (b"{", b'{"file": "c', b'{"file": "c", "caption": "x"}'):
        path.write_bytes(whole + torn)
        with ResultsFile(path) as results:
            assert path.read_bytes() == whole
            assert (results.num_good, results.num_bad, results.num_before) == (1, 1, 2)
            assert not results.claim("a")
            assert not results.claim("b\udcff", "what?")
            assert results.claim("b\udcff")
            assert results.claim("c")
    with ResultsFile(path) as results:
        results.write("c", caption="y")
    assert [line["file"] for line in lines(path)] == ["a", "b\udcff", "c"]


def test_two_runs_do_not_write_one_file(tmp_path):
    with ResultsFile(tmp_path / "out.jsonl"), pytest.raises(ValueError, match="another run is writing it"):
        ResultsFile(tmp_path / "out.jsonl")
    ResultsFile(tmp_path / "out.jsonl").__exit__()


@pytest.mark.parametrize("content", [b"# A page\nwith text", b'{"file": 3}\n', b"\x00\x01", b'[1]\n{"fi', b'{"name'])
def test_what_is_no_file_of_results_is_left_alone(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"out\.jsonl:1: is not a line"):
        ResultsFile(path)
    assert path.read_bytes() == content


def test_features_grow_and_lose_rows_without_a_line(tmp_path):
    path = tmp_path / "x.npy"
    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    with FeaturesFile(path, num_rows=0, width=3) as features:
        for i, row in enumerate(rows):
            assert features.append(row) == i
            assert np.array_equal(np.load(path), rows[: i + 1])  # as a kill would leave it
    assert np.array_equal(np.load(path, mmap_mode="r"), rows)
    with open(path, "ab") as file:
        file.write(b"torn")
    with FeaturesFile(path, num_rows=2, width=3) as features:
        assert features.append(rows[0]) == 2
    assert np.array_equal(np.load(path), rows[[0, 1, 0]])
    with pytest.raises(ValueError, match="name another file"):
        FeaturesFile(path, num_rows=2, width=4)
    with pytest.raises(ValueError, match="expected 9 rows"):
        FeaturesFile(path, num_rows=9, width=3)


# ---- reading ----


def test_a_file_that_kills_or_hangs_its_process_stops_no_other(clip):
    sources = {"dies": make_video(8, width=DIES), "hangs": make_video(8, width=HANGS), "text": b"text"}
    sources |= {f"good{i}": clip for i in range(4)}
    items = [Item(name, source) for name, source in sources.items()]
    reader = Reader(items, HostileTransform(64), num_frames=8, num_workers=1, timeout=2)
    with reader:
        found = {item.name: frames for item, frames in reader}
    assert set(found) == set(sources)
    assert "ended (SIGKILL)" in found["dies"]
    assert "not read within 2 s" in found["hangs"]
    assert "text file" in found["text"]
    assert all(found[name].startswith(f"{name}: ") for name in ("dies", "hangs", "text"))
    assert all(found[f"good{i}"].shape == (8, 64, 64, 3) for i in range(4))
    assert len(reader._workers) == 1  # of those that ended nothing is held


def test_reading_stays_a_bounded_number_ahead(clip):
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield Item(str(i), clip)

    with Reader(items(), Transform(64), num_frames=8, num_workers=1, ahead=3) as reader:
        found = iter(reader)
        next(found)
        held = 0
        while held != len(taken):  # until it stands still
            held = len(taken)
            time.sleep(0.5)
        assert held <= 1 + 3 + 1  # taken from it, waiting, in work
        assert len(list(found)) == 99


def test_an_error_of_the_source_ends_the_run():
    def items():
        yield Item("a", b"text")
        raise ValueError("list:2: not a path")

    reader = Reader(items(), Transform(64), num_frames=8, num_workers=1)
    with reader, pytest.raises(ValueError, match="list:2"):
        list(reader)


def test_equal_batches_let_nobody_wait_for_long():
    items = [*"aabcaaaaaaaaaaaaaa"]
    batches = list(equal_batches(items, 2, str))
    assert sorted(number for batch in batches for number, _ in batch) == list(range(len(items)))
    assert all(items[number] == item for batch in batches for number, item in batch)
    assert all(len({item for _, item in batch}) == 1 and len(batch) <= 2 for batch in batches)
    assert batches.index([(2, "b")]) == 4  # alone, after 4 batches of others


def test_read_ahead_is_ordered_and_bounded():
    taken = []

    def sources():
        for i in range(50):
            taken.append(i)
            yield str(i)

    for i, text in enumerate(read_ahead(lambda s: s * 2, sources(), ahead=4)):
        assert text == str(i) * 2
        assert len(taken) <= i + 5


# ---- the run ----


def test_every_item_has_one_line(model, folder, tmp_path, clip):
    write_tar(tmp_path / "s.tar", {"x.mp4": clip, "bad.mp4": b"text"})
    sources = [str(folder), str(folder / "0.mp4"), f"{tmp_path}/s.tar", f"{tmp_path}/absent.tar"]
    out = tmp_path / "out.jsonl"
    with ResultsFile(out) as results:
        summary = run(model, find_items(sources), Captioning(), results, num_workers=1, batch_size=4)
    assert (summary.num_good, summary.num_bad, summary.num_added) == (11, 4, 15)
    rows = lines(out)
    names = {item.name for item in find_items(sources)}
    assert len(rows) == len(names)
    assert {row["file"] for row in rows} == names
    assert all(row["error"].startswith(row["file"]) for row in rows if "error" in row)
    expected = model.caption(folder / "0.mp4", return_scores=True)
    for row in rows:
        if "error" not in row:
            assert row["caption"] == expected[0]
            assert row["score"] == pytest.approx(expected[1], rel=1e-4)
    with ResultsFile(out) as results:
        assert run(model, find_items(sources), Captioning(), results, num_workers=1).num_added == 0
    assert lines(out) == rows


def test_a_list_that_asks_is_captioned_once_a_file(model, folder, tmp_path):
    asked = [{"file": f, "question": q} for q in ("what?", "where?") for f in ("0.mp4", "text.mp4", "1.mp4")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    sources = {"sources": [str(tmp_path / "asked.jsonl")], "root": str(folder)}
    for _ in range(2):
        with ResultsFile(tmp_path / "out.jsonl") as results:
            run(model, find_items(**sources), Captioning(options=QUICK), results, num_workers=1)
        rows = lines(tmp_path / "out.jsonl")
        assert sorted(row["file"] for row in rows) == ["0.mp4", "1.mp4", "text.mp4"]


def test_numbers_that_are_not_finite_are_an_error_of_their_file(folder, tmp_path):
    broken = mplug2.create_model("nano", random_weights=True)
    broken.parts.decoder.head.bias.data.fill_(torch.nan)
    path = str(folder / "0.mp4")
    with ResultsFile(tmp_path / "c.jsonl") as results:
        run(broken, find_items([path]), Captioning(), results, num_workers=1)
    broken.parts.vision.class_embedding.data.fill_(torch.nan)
    with ResultsFile(tmp_path / "e.jsonl") as results, FeaturesFile(tmp_path / "e.npy", num_rows=0, width=128) as kept:
        run(broken, find_items([path]), Embedding(kept), results, num_workers=1)
    for rows in (lines(tmp_path / "c.jsonl"), lines(tmp_path / "e.jsonl")):
        assert [row["error"].startswith(f"{path}: the model's numbers are not finite") for row in rows] == [True]
    assert math.isnan(broken.caption(path, return_scores=True)[1])


def test_several_captions_share_a_line(model, folder, tmp_path):
    with ResultsFile(tmp_path / "out.jsonl") as results:
        run(model, find_items([str(folder / "0.mp4")]), Captioning(num_captions=2), results, num_workers=1)
    (row,) = lines(tmp_path / "out.jsonl")
    assert len(row["captions"]) == len(row["scores"]) == 2


def test_questions_are_asked_once_each(model, folder, tmp_path):
    out, files = tmp_path / "out.jsonl", [str(folder / name) for name in ("0.mp4", "text.mp4")]
    for questions in (["what is it?"], ["what is it?", "what color is it?"]):
        with ResultsFile(out) as results:
            run(model, find_items(files, questions=questions), Answering(), results, num_workers=1)
    rows = lines(out)
    assert sorted((row["file"], row["question"]) for row in rows) == sorted((f, q) for f in files for q in questions)
    assert {row["file"] for row in rows if "error" in row} == {files[1]}
    for row in rows:
        if "answer" in row:
            assert row["answer"] == model.answer(files[0], row["question"])


def test_killed_runs_neither_lose_nor_repeat_a_line(tmp_path, clip):
    clips, out = tmp_path / "clips", tmp_path / "out.jsonl"
    clips.mkdir()
    for i in range(40):
        (clips / f"{i}.mp4").write_bytes(clip if i % 8 else b"text")
    arguments = [sys.executable, "-m", "mplug2.cli", "caption", "--random-weights", "--workers", "1"]
    arguments += ["--batch-size", "2", *SHORT, str(clips), "--out", str(out)]
    rng = random.Random(3)
    for least in (1, 20):
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE)
        wanted = least + rng.randrange(12)
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < wanted):
            time.sleep(rng.uniform(0.001, 0.01))
        workers = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert wait_for_end(workers) == []
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    last = subprocess.run(arguments, capture_output=True, text=True)
    assert last.returncode == 1
    assert "35 done, 5 bad" in last.stderr
    rows = lines(out)
    assert sorted(row["file"] for row in rows) == sorted(str(path) for path in clips.iterdir())
    assert sum("error" in row for row in rows) == 5


def descendants(pid):
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            found += [child, *descendants(child)]
    return found


def wait_for_end(pids):
    """Those of the processes that still run after a while."""
    until = time.monotonic() + 30
    while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in pids):
        time.sleep(0.05)
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


# ---- the command line ----


def test_command_captions_a_folder(folder, tmp_path):
    out = tmp_path / "out.jsonl"
    options = ["--random-weights", "--workers", 1, *SHORT, folder, "--out", out]
    result = command("caption", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "10 done, 2 bad; 12 in" in result.stderr
    rows = lines(out)
    assert sorted(row["file"] for row in rows) == sorted(item.name for item in find_items([str(folder)]))
    assert {Path(row["file"]).name for row in rows if "error" in row} == {"text.mp4", "cut.mp4"}
    (folder / "new.png").write_bytes((folder / "0.mp4").read_bytes())
    assert "11 done, 2 bad, 12 of them from before; 1 in" in command("caption", *options).stderr


def test_command_parts_the_work(folder, tmp_path, monkeypatch):
    names = sorted(item.name for item in find_items([str(folder)]))
    options = ["--random-weights", "--workers", 1, *SHORT, folder, "--out", tmp_path / "out.jsonl", "--shard"]
    command("caption", *options, "1/2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert command("caption", *options, "0/2").exit_code == 0  # another status would end the other processes
    parts = [lines(tmp_path / f"out.{part}.jsonl") for part in ("1-of-2", "0-of-4", "2-of-4")]
    assert sorted(row["file"] for part in parts for row in part) == names


def test_command_asks_a_list(folder, tmp_path):
    asked = [{"file": f"{i}.mp4", "question": q} for i in range(2) for q in ("what is it?", "what color is it?")]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    options = ["--root", folder, "--random-weights", "--workers", 1, "--out", tmp_path / "out.jsonl"]
    assert command("ask", tmp_path / "asked.jsonl", *options).exit_code == 0
    rows = lines(tmp_path / "out.jsonl")
    assert [{"file": row["file"], "question": row["question"]} for row in rows] == asked
    (tmp_path / "unasked.txt").write_text("0.mp4\n")
    result = command("ask", tmp_path / "unasked.txt", *options)
    assert result.exit_code == 2
    assert "0.mp4: no question is asked" in result.stderr


def test_features_are_written_over_nothing_else(folder, tmp_path):
    options = ["--random-weights", "--workers", 1, "--out"]
    result = command("embed", folder, *options, tmp_path / "x.npy")
    assert result.exit_code == 2
    assert "x.npy: is where the features go" in result.stderr
    np.save(tmp_path / "y.npy", np.arange(3))
    (tmp_path / "z.npy").write_text("notes\n")
    for name, message in (("y", "expected 0 rows of 128 float32"), ("z", "is no .npy file of features")):
        content = (tmp_path / f"{name}.npy").read_bytes()
        result = command("embed", folder, *options, tmp_path / f"{name}.jsonl")
        assert result.exit_code == 2
        assert message in result.stderr
        assert (tmp_path / f"{name}.npy").read_bytes() == content


def test_a_line_taken_out_loses_no_row_of_the_others(folder, tmp_path):
    arguments = ["embed", folder, "--random-weights", "--workers", 1, "--out", tmp_path / "x.jsonl"]
    command(*arguments)
    before = np.load(tmp_path / "x.npy")
    kept = [line for line in lines(tmp_path / "x.jsonl") if line.get("row") != 4]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    command(*arguments)
    rows = [line["row"] for line in lines(tmp_path / "x.jsonl") if "row" in line]
    assert sorted(rows) == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert (np.load(tmp_path / "x.npy")[:10] == before).all()


def test_torchrun_does_not_share_standard_input(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("caption", "-", "--out", tmp_path / "x.jsonl")
    assert result.exit_code == 2
    assert "share one standard input" in result.stderr


def test_command_embeds_a_folder(folder, tmp_path):
    options = ["--normalize", "--random-weights", "--workers", 1, "--out", tmp_path / "x.jsonl"]
    assert command("embed", folder / "b", *options).exit_code == 1
    with open(tmp_path / "x.npy", "ab") as file:  # as a kill leaves it: a row without its line
        file.write(b"\0" * 512)
    assert command("embed", folder, *options).exit_code == 1
    rows = [row for row in lines(tmp_path / "x.jsonl") if "error" not in row]
    features = np.load(tmp_path / "x.npy")
    assert [row["row"] for row in rows] == list(range(10))
    assert features.shape == (10, 128)
    printed = json.loads(command("embed", "--normalize", "--random-weights", folder / "0.mp4").stdout)["embedding"]
    assert features == pytest.approx(np.array([printed] * 10), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caption", "."], "name a file for the results"),
        (["caption", "x.mp4", "--out", "o.jsonl", "--shard", "2/2"], "--shard: 2/2"),
        (["caption", "x.mp4", "--shard", "0/2"], "go with --out"),
        (["ask", "x.mp4"], "needs a question"),
        (["embed", "--out", "o.jsonl"], "needs files"),
        (["embed", "x.mp4", "--text", "x", "--out", "o.jsonl"], "exclude each other"),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# ---- Python ----

QUICK = {"beam_size": 2, "min_length": 0, "max_length": 4}


def test_a_generator_is_answered_as_it_goes(model, folder):
    files = [folder / f"{i}.mp4" for i in range(6)]
    taken = []

    def sources():
        for i in range(1000):
            assert i < 60, "was read to its end"
            taken.append(i)
            yield files[i % 6]

    captions = model.caption(sources(), batch_size=2, **QUICK)
    assert taken == []
    first = [next(captions) for _ in range(3)]
    assert len(taken) < 12
    assert first == model.caption(files[:3], **QUICK)
    captions.close()


def test_generators_keep_their_order(model, folder, tmp_path):
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    files = [folder / "0.mp4", tmp_path / "red.png", folder / "1.mp4", folder / "2.mp4"]
    expected = model.caption(files, return_scores=True, **QUICK)
    found = list(model.caption(iter(files), return_scores=True, batch_size=2, **QUICK))
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], rel=1e-4)
    assert torch.allclose(torch.stack([*model.encode_video(iter(files))]), model.encode_video(files), atol=1e-5)
    questions = ["what?", "what color is it?", "who?", "what does it do?"]
    assert list(model.answer(iter(files), iter(questions))) == model.answer(files, questions)
    assert list(model.answer(iter(files), "what is it?")) == model.answer(files, "what is it?")
    with pytest.raises(ValueError, match=r"zip\(\)"):
        list(model.answer(iter(files), questions[:2]))


def test_a_loader_gives_batches(model):
    videos = torch.randint(0, 256, (5, 3, 8, 64, 64), dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(videos, batch_size=2)
    assert list(model.caption(loader, **QUICK)) == model.caption(videos, **QUICK)
    normalized = (model.transform.normalize(video.permute(1, 2, 3, 0))[None] for video in videos)
    assert list(model.caption(normalized, **QUICK)) == model.caption(videos, **QUICK)


def test_a_bad_file_of_a_generator_is_named(model, folder):
    captions = model.caption((folder / name for name in ("0.mp4", "text.mp4")), batch_size=1, **QUICK)
    assert next(captions) == model.caption(folder / "0.mp4", **QUICK)
    with pytest.raises(MediaError, match=r"text\.mp4"):
        next(captions)


def test_good_files_come_before_the_error_of_a_bad_one(model, folder):
    captions = model.caption((folder / name for name in ("0.mp4", "1.mp4", "text.mp4", "2.mp4")), **QUICK)
    assert [next(captions), next(captions)] == [model.caption(folder / "0.mp4", **QUICK)] * 2
    with pytest.raises(MediaError, match=r"text\.mp4"):
        next(captions)


def test_gradients_are_on_after_captions(model, folder):
    for source in (folder / "0.mp4", [folder / "0.mp4", folder / "text.mp4"]):
        with contextlib.suppress(MediaError):
            model.caption(source, batch_size=1, **QUICK)
        gc.collect()
        assert torch.is_grad_enabled()


def test_ray_gives_errors_as_a_column(folder):
    pytest.importorskip("ray.data")
    from mplug2.inference.ray import caption

    with pytest.raises(ValueError, match="num_captions must be 1"):
        caption([], num_captions=2)
    # In a program of its own: Ray warns in its own ways, and leaves processes behind until its driver ends.
    code = "import json, sys; from mplug2.inference.ray import caption\n"
    code += "rows = caption(sys.argv[1:], num_actors=1, batch_size=4, create={'random_weights': True}).take_all()\n"
    code += "print(json.dumps(rows))"
    files = [item.name for item in find_items([str(folder)])]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    rows = {row["file"]: row for row in json.loads(done.stdout.splitlines()[-1])}
    assert set(rows) == set(files)
    bad = {name for name, row in rows.items() if row["error"]}
    assert {Path(name).name for name in bad} == {"text.mp4", "cut.mp4"}
    assert all(rows[name]["caption"] == "" and name in rows[name]["error"] for name in bad)
    assert all(isinstance(rows[name]["score"], float) for name in files)
