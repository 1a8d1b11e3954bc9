"""Text: the word-piece tokenizer, and the cleaning of captions and questions that the released weights know."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors
from torch import Tensor

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
_REQUIRED = (PAD, UNKNOWN, START, END)
_PUNCTUATION = ",.'!?\"()*#:;~"
_CLEANED = str.maketrans({**dict.fromkeys(_PUNCTUATION), "-": " ", "/": " "})
# Spaces that joining word pieces leaves before punctuation and inside contractions, in the order they are taken out.
_TIGHTENED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


class Tokens(NamedTuple):
    """A padded batch. ids: int64 (B, S). mask: bool (B, S), true where a token stands."""

    ids: Tensor
    mask: Tensor


class Tokenizer:
    """Uncased BERT word pieces. Ids of a text are [CLS] and its pieces.

    No [SEP] is appended: the strings that end carry "[SEP]" themselves, and a special token written in a text stands
    for itself. The released weights were trained this way. A text cut to max_length therefore loses its "[SEP]".

    vocab_file: a vocab.txt, one piece a line, the id is the line number from 0; None takes the 30,522 pieces of BERT
    base, uncased.

    ValueError: the file lacks [PAD], [UNK], [CLS] or [SEP], or holds a piece twice.
    """

    def __init__(self, vocab_file: str | os.PathLike | None = None) -> None:
        path = files("mplug2.data") / "vocab" / "vocab.txt" if vocab_file is None else Path(vocab_file)
        pieces = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        vocab = {piece: i for i, piece in enumerate(pieces)}
        if missing := [piece for piece in _REQUIRED if piece not in vocab]:
            raise ValueError(f"{path}: lacks the piece {missing[0]}; expected a BERT vocab.txt with one piece a line")
        if len(vocab) < len(pieces):
            twice = next(piece for i, piece in enumerate(pieces) if vocab[piece] != i)
            lines = f"{pieces.index(twice) + 1} and {vocab[twice] + 1}"
            raise ValueError(f"{path}: piece {twice!r} stands on lines {lines}")
        self._pieces = pieces
        self.vocab = vocab
        self.pad_id, self.unknown_id, self.start_id, self.end_id = (vocab[piece] for piece in _REQUIRED)
        self.special_ids = frozenset(vocab[piece] for piece in (*_REQUIRED, MASK) if piece in vocab)

        self._engine = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=100))
        self._engine.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._engine.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, self.start_id)]
        )
        self._engine.add_special_tokens([piece for piece in (*_REQUIRED, MASK) if piece in vocab])

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids of one text, [CLS] first, cut to max_length ids."""
        return self._engine.encode(text).ids[:max_length]

    def __call__(self, texts: str | Sequence[str], *, max_length: int | None = None) -> Tokens:
        """Ids and mask of a batch, padded with [PAD] to its longest text, which is cut to max_length ids."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if max_length is not None and max_length < 1:
            raise ValueError(f"Tokenizer: max_length must be at least 1, got {max_length}")
        rows = [encoding.ids[:max_length] for encoding in self._engine.encode_batch(texts)]
        ids = torch.full((len(rows), max(map(len, rows), default=0)), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = True
        return Tokens(ids, mask)

    def decode(self, ids: Iterable[int] | Tensor, *, skip_special_tokens: bool = False) -> str:
        """Text of one row of ids: pieces joined, spaces before punctuation and inside contractions taken out."""
        ids = ids.tolist() if isinstance(ids, Tensor) else ids
        pieces = [self._pieces[i] for i in ids if not (skip_special_tokens and i in self.special_ids)]
        text = " ".join(pieces).replace(" ##", "")
        for loose in _TIGHTENED:
            text = text.replace(loose, loose.strip())
        return text


def pre_caption(caption: str, max_words: int = 80) -> str:
    """A caption as the weights saw it: lower case, without punctuation, single spaces, at most max_words words."""
    text = caption.lower().translate(_CLEANED).replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def pre_question(question: str, max_words: int = 50) -> str:
    """A question as the weights saw it: lower case, without punctuation. Inner spaces stay, and each counts as a word.

    max_words: 30 in training, 50 at test.
    """
    text = question.lower().translate(_CLEANED).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])


def training_string(caption: str, prompt: str = "", *, end: str = END, glued: bool = True) -> str:
    """What the captioner learns to write: prompt, cleaned caption, end token.

    glued: prompt and caption are joined without a space, so the caption's first word becomes a continuation ("a video
    of" + "a man" reads a video of ##a man), as the released weights were trained. False puts the space in.
    """
    text = pre_caption(caption)
    return f"{prompt}{'' if glued or not (prompt and text) else ' '}{text}{end}"


def clean_generated(text: str, prompt: str = "", *, keep_after_end: bool = False) -> str:
    """The caption or answer in a decoded text: no special tokens, no prompt in front.

    keep_after_end: the released evaluation deletes "[SEP]" and keeps the words behind one that the beam search left in
    the middle; by default the text stops at the first. A prompt is taken off the front only, where the released one
    also cuts it out of captions.
    """
    text = text if keep_after_end else text.split(END)[0]
    for piece in (END, START, PAD):
        text = text.replace(piece, "")
    return text.strip().removeprefix(prompt).strip()
