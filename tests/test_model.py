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
    alone = [model.caption(path, return_scores=True) for path in files]
    assert [text for text, _ in many] == [text for text, _ in alone]
    assert [score for _, score in many] == pytest.approx([score for _, score in alone], rel=1e-5)
    assert len({round(score, 4) for _, score in many}) == 3, "three clips must be told apart"
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
    with pytest.raises(ValueError, match="2 questions, 3 sources"):
        model.answer(files, ["what?", "who?"])


def test_questions_go_to_their_videos_in_any_batch_size(model, files):
    questions = ["what is it?", "what color is it?", "what does it do?"]
    each = model.answer(files, questions, return_scores=True, batch_size=2)
    alone = [model.answer(f, q, return_scores=True) for f, q in zip(files, questions, strict=True)]
    assert [score for _, score in each] == pytest.approx([score for _, score in alone], rel=1e-5)
    several = model.answer(files[0], questions * 3, return_scores=True, batch_size=2)
    assert len(several) == 9
    assert [score for _, score in several[:3]] == pytest.approx([score for _, score in several[3:6]], rel=1e-5)


def test_a_long_question_is_cut(model, files):
    assert isinstance(model.answer(files[0], "what " * 400), str)


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


@pytest.mark.parametrize("decoding", ["released", "standard", "sample"])
def test_prompt_is_forced_and_not_repeated(model, files, decoding):
    sampling = {"sampling": {"top_k": 1}} if decoding == "sample" else {}
    text, score = model.caption(files[0], prompt="A Red bag", return_scores=True, decoding=decoding, **sampling)
    assert not text.startswith("a red bag")
    assert score != model.caption(files[0], return_scores=True, decoding=decoding, **sampling)[1]


def test_saved_model_says_the_same(model, files, tmp_path):
    model.save(tmp_path / "model")
    copy = mplug2.create_model(tmp_path / "model")
    assert not copy.load_report.missing
    assert copy.caption(files[0], return_scores=True) == model.caption(files[0], return_scores=True)
    copy.parts.decoder.layers[0].mlp.up.weight.data.zero_()
    assert copy.caption(files[0], return_scores=True) != model.caption(files[0], return_scores=True)
    half = mplug2.create_model(tmp_path / "model", task="video-captioning", dtype=torch.bfloat16)
    assert half.parts.text is None
    assert isinstance(half.caption(files[0]), str)
    with pytest.raises(ValueError, match="create it with task='video-qa'"):
        half.answer(files[0], "what is it?")


@pytest.mark.parametrize("instruction", [False, True])
def test_saved_model_remembers_its_tasks(files, tmp_path, instruction):
    one = mplug2.create_model("nano", task="video-captioning", instruction=instruction, random_weights=True)
    one.save(tmp_path / "model")
    copy = mplug2.create_model(tmp_path / "model")
    assert copy.parts.tasks == ("video-captioning",)
    assert (copy.parts.text is not None) == instruction
    options = {"instruction": "what does the video show?"} if instruction else {}
    assert copy.caption(files[0], **options) == one.caption(files[0], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "large"}, "has no weights of its own"),
        ({"name": "gigantic"}, "gigantic"),
        ({"name": "large", "weights": "absent.pth"}, r"absent\.pth: no such file"),
        ({"name": "nano", "task": "caption", "random_weights": True}, "unknown task 'caption'"),
        ({"name": "large", "weights": "absent.pth", "random_weights": True}, "exclude each other"),
        ({"name": "large", "revision": "main", "random_weights": True}, "has no revision"),
    ],
)
def test_what_cannot_be_created_says_why(options, message):
    with pytest.raises(ValueError, match=message):
        mplug2.create_model(**options)


def test_vocabulary_must_fit_the_model(model, tmp_path):
    model.save(tmp_path / "model")
    pieces = (tmp_path / "model" / "vocab.txt").read_text().splitlines()
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(pieces[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: 2047 pieces, but the model's table has 2048"):
        mplug2.create_model(tmp_path / "model")
    pieces[2], pieces[9] = pieces[9], pieces[2]
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    with pytest.raises(ValueError, match=r"\[PAD\], \[CLS\], \[SEP\] must be pieces \(0, 2, 3\)"):
        mplug2.create_model(tmp_path / "model")


def test_tensors_do_not_come_in_lists(model):
    with pytest.raises(ValueError, match=r"use torch\.stack"):
        model.caption([torch.zeros(3, 2, 64, 64)])


def test_tensor_of_the_wrong_shape(model):
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        model.caption(torch.zeros(3, 8, 64, 64))
