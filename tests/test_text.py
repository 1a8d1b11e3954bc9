"""Tokenizer, and the cleaning of captions, questions and generated text, against golden strings."""

import hashlib
import json
from importlib.resources import files

import pytest
import torch

from mplug2.data.text import Tokenizer, clean_generated, pre_caption, pre_question, training_string


@pytest.fixture(scope="module")
def golden(parity_dir):
    return json.loads((parity_dir / "text_preproc.json").read_text())


@pytest.fixture(scope="module")
def toy(parity_dir):
    return json.loads((parity_dir / "tokenizer.json").read_text())


@pytest.fixture
def toy_tokenizer(toy, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(toy["vocab"]) + "\n", encoding="utf-8")
    return Tokenizer(tmp_path / "vocab.txt")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer()


def test_cleaning_equals_golden(golden):
    for case in golden["pre_caption"]:
        assert pre_caption(case["text"], case["max_words"]) == case["out"], case
    for case in golden["pre_question"]:
        assert pre_question(case["text"], case["max_words"]) == case["out"], case
    for case in golden["caption_training_strings"]:
        assert pre_caption(case["caption"]) == case["pre"]
        assert training_string(case["caption"], case["prompt"], end=case["eos"]) == case["out"]
    for case in golden["generated_cleaning"]:
        assert clean_generated(case["decoded"], case["prompt"], keep_after_end=True) == case["caption"], case


def test_prompt_is_glued_unless_asked_otherwise(tokenizer):
    assert training_string("A man.", "a video of") == "a video ofa man[SEP]"
    assert training_string("A man.", "a video of", glued=False) == "a video of a man[SEP]"
    assert training_string("A man.", "", glued=False) == "a man[SEP]"
    glued, spaced = (tokenizer.encode(training_string("a man", "a video of", glued=g)) for g in (True, False))
    assert tokenizer.decode(glued) == "[CLS] a video ofa man [SEP]"
    assert tokenizer.decode(spaced) == "[CLS] a video of a man [SEP]"


def test_generated_text_ends_at_its_end_and_keeps_a_prompt_inside():
    assert clean_generated("[CLS] a video of a cat [SEP] playing [SEP]", "a video of") == "a cat"
    assert (
        clean_generated("[CLS] a man makes a video of a cat [SEP] [PAD]", "a video of")
        == "a man makes a video of a cat"
    )
    assert clean_generated("[CLS] a video of a cat [SEP]") == "a video of a cat"


def test_tokenizer_equals_golden(toy, toy_tokenizer):
    for case in toy["single"]:
        assert toy_tokenizer.encode(case["text"]) == case["ids"], case["text"]
    for case in toy["decode"]:
        assert toy_tokenizer.decode(case["ids"]) == case["text"]
        assert toy_tokenizer.decode(torch.tensor(case["ids"])) == case["text"]
    texts = toy["padded"]["texts"]
    for case, limit in ((toy["padded"], None), (toy["truncated"], toy["truncated"]["max_length"])):
        ids, mask = toy_tokenizer(texts, max_length=limit)
        assert ids.dtype == torch.int64
        assert mask.dtype == torch.bool
        assert ids.tolist() == case["input_ids"]
        assert mask.int().tolist() == case["attention_mask"]
        for text, row, used in zip(texts, ids, mask, strict=True):
            assert toy_tokenizer.encode(text, limit) == row[used].tolist()


def test_ids_of_the_shipped_vocabulary(tokenizer):
    vocab = (files("mplug2.data") / "vocab" / "vocab.txt").read_bytes()
    assert hashlib.sha256(vocab).hexdigest() == "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
    assert "Apache License" in (files("mplug2.data") / "vocab" / "LICENSE").read_text()
    assert tokenizer.vocab_size == 30522
    assert (tokenizer.pad_id, tokenizer.unknown_id, tokenizer.start_id, tokenizer.end_id) == (0, 100, 101, 102)
    assert tokenizer.encode("Hello, world!") == [101, 7592, 1010, 2088, 999]
    assert tokenizer.encode("NAÏVE café[SEP]") == [101, 15743, 7668, 102]
    assert tokenizer.decode([101, 7592, 1010, 2088, 999, 102], skip_special_tokens=True) == "hello, world!"


def test_special_tokens_are_known_only_as_they_are_written(tokenizer):
    assert tokenizer.encode("a[SEP]b [MASK] [PAD]") == [101, 1037, 102, 1038, 103, 0]
    assert 102 not in tokenizer.encode("[sep] [ SEP ]")


def test_batches_of_one_and_none(tokenizer):
    assert tokenizer("a video").ids.tolist() == [[101, 1037, 2678]]
    ids, mask = tokenizer([])
    assert ids.shape == mask.shape == (0, 0)
    assert tokenizer("a video", max_length=1).ids.tolist() == [[101]]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        tokenizer("a", max_length=0)


def test_a_bad_vocabulary_is_named(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("[PAD]\n[UNK]\n[CLS]\na\n")
    with pytest.raises(ValueError, match=r"vocab\.txt: lacks the piece \[SEP\]"):
        Tokenizer(path)
    path.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n")
    with pytest.raises(ValueError, match=r"piece 'a' stands on lines 5 and 7"):
        Tokenizer(path)
