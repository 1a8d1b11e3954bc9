"""Every module against the golden numbers of the published reference code, from official parameter names."""

import pytest
import torch
from torch import nn

from mplug2.config import ModelConfig, VisionConfig
from mplug2.modules import Decoder, Fusion, LocalTemporal, TextEncoder, UniversalLayers, VisionBlock, VisionEncoder
from mplug2.modules.heads import LmHead
from parity_case import Case, Holder, load, model_config, official_grads

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
BLOCK = "visual_encoder.visual.transformer.resblocks.0."


def tokens_of(x):
    """(N, C, T, H, W) -> (N, T, H * W, C)."""
    return x.flatten(3).permute(0, 2, 3, 1)


@DTYPES
def test_local_temporal(parity_dir, dtype):
    case = Case(parity_dir, "local_temporal", dtype)
    prefix = BLOCK + "lmhra1."
    x = case.input("x").requires_grad_()
    with torch.device("meta"):
        module = LocalTemporal(x.shape[1])
        holder = Holder(ModelConfig(), vision=nn.ModuleDict({"blocks": nn.ModuleList([nn.Module()])}))
        holder.vision["blocks"][0].local_temporal1 = module
    params = case.params(prefix)
    load(holder, params, dtype)
    # No class token in this case: one is put in front of every frame and must pass through untouched.
    tokens = tokens_of(x)
    tokens = torch.cat([torch.full_like(tokens[:, :, :1], 3.0), tokens], 2)
    out = module(tokens)
    assert torch.equal(out[:, :, 0], tokens[:, :, 0])
    y = (out - tokens)[:, :, 1:].permute(0, 3, 1, 2).reshape(x.shape)  # recorded before the residual is added
    case.expect("y", y)
    (y * case.input("probe")).sum().backward()
    grads = {n.removeprefix(prefix): g for n, g in official_grads(holder, params).items()}
    case.expect_grads({**grads, "input.x": x.grad})


@DTYPES
def test_temporal_block(parity_dir, dtype):
    case = Case(parity_dir, "temporal_block", dtype)
    size = case.json["config"]
    with torch.device("meta"):
        width = size["d_model"]
        config = VisionConfig(width=width, num_heads=size["n_head"], mlp_width=4 * width)
        holder = Holder(
            ModelConfig(vision=config), vision=nn.ModuleDict({"blocks": nn.ModuleList([VisionBlock(config)])})
        )
    params = case.params(BLOCK)
    load(holder, params, dtype)
    block = holder.vision["blocks"][0]

    def run(x, frames):  # (1 + HW, N * T, C) as recorded
        y = block(x.transpose(0, 1).unflatten(0, (-1, frames)))
        return y.flatten(0, 1).transpose(0, 1)

    case.expect("y_T1", run(case.input("x_T1"), 1))
    x = case.input("x").requires_grad_()
    y = run(x, size["T"])
    case.expect("y", y)
    (y * case.input("probe")).sum().backward()
    grads = {n.removeprefix(BLOCK): g for n, g in official_grads(holder, params).items()}
    case.expect_grads({**grads, "input.x": x.grad})


@DTYPES
@pytest.mark.parametrize("name", ["video_former", "video_former_tdown"])
def test_vision_encoder(parity_dir, dtype, name):
    case = Case(parity_dir, name, dtype)
    size = case.json["config"]
    config = VisionConfig(
        width=size["width"], num_layers=size["layers"], num_heads=size["heads"], mlp_width=4 * size["width"],
        image_size=size["input_resolution"], patch_size=size["patch_size"],
        temporal_stride=size["temporal_stride"] if size["temporal_downsampling"] else None,
    )  # fmt: skip
    with torch.device("meta"):
        holder = Holder(ModelConfig(vision=config), vision=VisionEncoder(config))
    prefix = "visual_encoder.visual."
    params = case.params(prefix)
    load(holder, params, dtype)
    if "input.image" in case.tensors:
        case.expect("y_image", holder.vision(case.input("image")))
    video = case.input("video").requires_grad_()
    if f"{case.tag}.out.block0" in case.tensors:
        block0 = holder.vision.blocks[0](holder.vision.embed(video))
        case.expect("block0", block0.flatten(0, 1).transpose(0, 1))
    y = holder.vision(video)
    case.expect("y", y)
    (y * case.input("probe")).sum().backward()
    grads = {n.removeprefix(prefix): g for n, g in official_grads(holder, params).items()}
    case.expect_grads({**grads, "input.video": video.grad})


def text_holder(case):
    config = model_config(case.json["config"])
    with torch.device("meta"):
        holder = Holder(config, text=TextEncoder(config.text), universal=UniversalLayers(config.universal, config.text))
        # The norm after the exchange lies outside the recorded module.
        holder.universal.norm = nn.Identity()
    params = case.params("text_encoder.")
    load(holder, params, case.dtype)
    return holder, params


@DTYPES
def test_text_encoder(parity_dir, dtype):
    case = Case(parity_dir, "bert_encoder", dtype)
    holder, params = text_holder(case)
    ids, mask = case.input("input_ids"), case.mask("attention_mask")
    case.expect("embeddings", holder.text.embeddings(ids))
    states = holder.text(ids, mask)
    case.expect("text", states)
    case.expect("norm_no_mask", holder.universal.text(holder.text(ids)))
    types = holder.text(ids, mask, token_types=case.input("token_type_ids"))
    case.expect("norm_token_types", holder.universal.text(types, mask))
    y = holder.universal.text(states, mask)
    case.expect("norm", y)
    (y * case.input("probe_text")).sum().backward()
    grads = {n.removeprefix("text_encoder."): g for n, g in official_grads(holder, params).items()}
    case.expect_grads(grads, group="norm.", norms=case.json["grads_norm_mode"]["grad_norms"])


@DTYPES
def test_universal_layers_on_vision(parity_dir, dtype):
    case = Case(parity_dir, "bert_encoder", dtype)
    holder, params = text_holder(case)
    case.expect("v_module_padded", holder.universal.exchange(case.input("visual"), case.mask("visual_pad_mask")))
    visual = case.input("visual").requires_grad_()
    y = holder.universal.exchange(visual, case.mask("visual_mask"))
    case.expect("v_module", y)
    case.expect("v_module_other_embeds", y)
    (y * case.input("probe_visual")).sum().backward()
    grads = {n.removeprefix("text_encoder."): g for n, g in official_grads(holder, params).items()}
    grads["input.visual"] = visual.grad
    case.expect_grads(grads, group="v_module.", norms=case.json["grads_v_module"]["grad_norms"])


@DTYPES
@pytest.mark.parametrize("name", ["fusion", "fusion_stride"])
def test_fusion(parity_dir, dtype, name):
    case = Case(parity_dir, name, dtype)
    config = model_config(case.json["config"])
    with torch.device("meta"):
        holder = Holder(config, fusion=Fusion(config.fusion, config.text))
    params = case.params("fusion_encoder.")
    load(holder, params, dtype)
    visual, text = (case.input(n).requires_grad_() for n in ("visual", "text"))
    masks = {"visual_mask": case.mask("visual_mask"), "text_mask": case.mask("text_mask")}
    got_visual, got_text = holder.fusion(visual, text, **masks)
    case.expect("visual", got_visual)
    case.expect("text", got_text)
    ((got_visual * case.input("probe_visual")).sum() + (got_text * case.input("probe_text")).sum()).backward()
    grads = {n.removeprefix("fusion_encoder."): g for n, g in official_grads(holder, params).items()}
    case.expect_grads({**grads, "input.visual": visual.grad, "input.text": text.grad})


def decoder_holder(case):
    config = model_config(case.json["config"], decoder_layers=case.json["config"]["num_hidden_layers"])
    with torch.device("meta"):
        holder = Holder(config, decoder=Decoder(config.decoder, config.text))
    params = case.params("text_decoder.")
    load(holder, params, case.dtype)
    return holder, params


@DTYPES
def test_decoder_logits(parity_dir, dtype):
    case = Case(parity_dir, "decoder", dtype)
    decoder = decoder_holder(case)[0].decoder
    context = decoder.project(case.input("source"), case.mask("source_mask"))
    ids, mask = case.input("input_ids"), case.mask("attention_mask")
    case.expect("logits", decoder.logits(decoder(ids, context, mask=mask)))
    case.expect("logits_no_text_mask", decoder.logits(decoder(ids, context)))
    case.expect("logits_not_causal", decoder.logits(decoder(ids, context, mask=mask, causal=False)))


@DTYPES
@pytest.mark.parametrize("kind", ["prefix", "lmhead"])
def test_decoder_loss(parity_dir, dtype, kind):
    case = Case(parity_dir, "decoder", dtype)
    holder, params = decoder_holder(case)
    source = case.input("source").requires_grad_()
    context = holder.decoder.project(source, case.mask("source_mask"))
    states = holder.decoder(case.input("input_ids"), context, mask=case.mask("attention_mask"))
    word = holder.decoder.embeddings.word.weight
    labels = case.input("labels" if kind == "prefix" else "labels_full")[:, 1:]
    loss = holder.decoder.head.loss(states[:, :-1], word, labels, reduction="mean" if kind == "prefix" else "row")
    case.expect(f"{kind}.loss", loss)
    loss.sum().backward()
    grads = {n.removeprefix("text_decoder."): g for n, g in official_grads(holder, params).items()}
    grads["input.source"] = source.grad
    case.expect_grads(grads, group=f"{kind}.", norms=case.json[f"grads_{kind}"]["grad_norms"])


@DTYPES
def test_masked_lm_on_text(parity_dir, dtype):
    case = Case(parity_dir, "masked_lm", dtype)
    config = model_config({**case.json["config"], **case.json["text_config_overrides"]})
    with torch.device("meta"):
        holder = Holder(
            config,
            text=TextEncoder(config.text),
            universal=UniversalLayers(config.universal, config.text, has_vision=False),
            heads=nn.ModuleDict({"mlm": LmHead(config.text)}),
        )
    params = {n: p for n, p in case.params().items() if n.startswith("text.")}
    params = {n.replace("text.", "text_encoder.", 1): p for n, p in params.items()}
    load(holder, params, dtype)
    mask = case.mask("attention_mask")
    states = holder.universal.text(holder.text(case.input("input_ids"), mask), mask)
    word, head = holder.text.embeddings.word.weight, holder.heads.mlm
    case.expect("text.logits", head.logits(states, word))
    loss = head.loss(states, word, case.input("labels"))
    case.expect("text.loss", loss)
    loss.backward()
    grads = {n.removeprefix("text_encoder."): g for n, g in official_grads(holder, params).items()}
    case.expect_grads(grads, norms=case.json["grads_text"]["grad_norms"])


@DTYPES
def test_masked_lm_on_fused_text(parity_dir, dtype):
    case = Case(parity_dir, "masked_lm", dtype)
    config = model_config({**case.json["config"], **case.json["fusion_config_overrides"]})
    with torch.device("meta"):
        holder = Holder(
            config,
            fusion=Fusion(config.fusion, config.text),
            heads=nn.ModuleDict({"mlm": LmHead(config.text)}),
        )
    ours = {n.removeprefix("fusion."): p for n, p in case.params().items() if n.startswith("fusion.")}
    # The head has the name it would have in the whole model: our masked-LM head is the text encoder's.
    params = {("text_encoder." if n.startswith("cls.") else "fusion_encoder.") + n: p for n, p in ours.items()}
    load(holder, params, dtype)
    _, states = holder.fusion(
        case.input("visual"),
        case.input("text"),
        visual_mask=case.mask("visual_mask"),
        text_mask=case.mask("attention_mask"),
    )
    head = holder.heads.mlm
    word = next(p for n, p in params.items() if n.endswith("word_embeddings.weight")).requires_grad_()
    case.expect("fusion.logits", head.logits(states, word))
    loss = head.loss(states, word, case.input("labels"))
    case.expect("fusion.loss", loss)
    loss.backward()
    grads = {n.partition(".")[2]: g for n, g in official_grads(holder, params).items()}
    grads["bert.embeddings.word_embeddings.weight"] = word.grad
    case.expect_grads(grads, norms=case.json["grads_fusion"]["grad_norms"])
