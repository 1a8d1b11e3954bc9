"""The task model: from files, bytes and tensors to captions, answers and features."""

import io

import pytest
import torch

import mplug2
from make_clips import make_video
from mplug2.data import MediaError


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return mplug2.create_model("nano", random_weights=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    paths = [folder / f"{name}.mp4" for name in ("a", "b", "c")]
    for i, path in enumerate(paths):
        path.write_bytes(make_video(12 + i))
    return paths


def test_a_caption_is_one_string_and_a_list_gives_a_list(model, files):
    one = model.caption(files[0])
    assert isinstance(one, str)
    many = model.caption(files, batch_size=2, return_scores=True)
    assert [text for text, _ in many] == [model.caption(path) for path in files]
    assert many[0][0] == one
    assert all(score < 0 for _, score in many)


def test_path_bytes_file_and_tensor_give_the_same(model, files):
    data = files[0].read_bytes()
    want = model.caption(files[0], return_scores=True)
    assert model.caption(data, return_scores=True) == want
    assert model.caption(io.BytesIO(data), return_scores=True) == want
    assert model.caption(str(files[0]), return_scores=True) == want
    tensor = model.read(files[0])[None]
    assert model.caption(tensor, return_scores=True) == [want]


def test_uint8_tensors_are_resized(model):
    frames = torch.randint(0, 256, (2, 3, 5, 40, 30), dtype=torch.uint8)
    assert len(model.caption(frames)) == 2
    transformed = torch.stack([model.transform(f.permute(1, 2, 3, 0)) for f in frames])
    assert model.caption(frames, return_scores=True) == model.caption(transformed, return_scores=True)


def test_several_captions_come_best_first(model, files):
    found = model.caption(files[0], num_captions=3, return_scores=True)
    assert len(found) == 3
    assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)


def test_an_image_is_a_video_of_one_frame(model, tmp_path):
    from PIL import Image

    Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "red.png")
    assert model.read(tmp_path / "red.png").shape == (3, 1, 64, 64)
    assert isinstance(model.caption(tmp_path / "red.png"), str)


def test_answers(model, files):
    assert isinstance(model.answer(files[0], "what is it?"), str)
    assert len(model.answer(files[0], ["what is it?", "what color is it?"])) == 2
    assert len(model.answer(files, "what is it?")) == 3
    answer, score = model.answer(files[0], "what is it?", answers=["bag", "coat", "dress"], return_scores=True)
    assert answer in ("bag", "coat", "dress")
    assert 1 / 3 <= score <= 1
    with pytest.raises(ValueError, match="one question per video"):
        model.answer(files, ["what?", "who?"])


def test_features(model, files):
    v = model.encode_video(files, normalize=True)
    assert v.shape == (3, 128)
    assert v.norm(dim=1).tolist() == pytest.approx([1.0] * 3, rel=1e-5)
    t = model.encode_text(["a red bag", "a coat"])
    assert t.shape == (2, 128)
    assert torch.allclose(model.encode_text("a coat"), t[1:], atol=1e-5)  # padding changes nothing


def test_a_bad_file_is_named(model, tmp_path):
    (tmp_path / "bad.mp4").write_text("not a video")
    with pytest.raises(MediaError, match=r"bad\.mp4"):
        model.caption(tmp_path / "bad.mp4")


def test_prompt_is_forced_and_not_repeated(model, files):
    text = model.caption(files[0], prompt="a red bag")
    assert not text.startswith("a red bag")


def test_saved_model_says_the_same(model, files, tmp_path):
    model.save(tmp_path / "model")
    copy = mplug2.create_model(tmp_path / "model")
    assert not copy.load_report.missing
    assert copy.caption(files[0], return_scores=True) == model.caption(files[0], return_scores=True)
    half = mplug2.create_model(tmp_path / "model", task="video-captioning", dtype=torch.bfloat16)
    assert half.parts.text is None
    assert isinstance(half.caption(files[0]), str)
    with pytest.raises(ValueError, match="create it with task='video-qa'"):
        half.answer(files[0], "what is it?")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "large"}, "has no weights of its own"),
        ({"name": "gigantic"}, "gigantic"),
        ({"name": "large", "weights": "absent.pth"}, r"absent\.pth: no such file"),
        ({"name": "nano", "task": "caption", "random_weights": True}, "unknown task 'caption'"),
    ],
)
def test_what_cannot_be_created_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        mplug2.create_model(**options)


def test_tensor_of_the_wrong_shape(model):
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        model.caption(torch.zeros(3, 8, 64, 64))
