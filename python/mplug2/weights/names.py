"""Where each parameter of ours lies in a released checkpoint. Nothing else knows the old names.

Names are canonical: without the prefixes `module.`, `bert.`, `fusion.` that some files carry (see `canonical`).
"""

from __future__ import annotations

import re

# Ours -> old, inside one layer. Several old names are stacked along dimension 0.
_BERT_LAYER = {
    "self_attention.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "self_attention.out": ("attention.output.dense",),
    "self_norm": ("attention.output.LayerNorm",),
    "cross_attention.query": ("crossattention.self.query",),
    "cross_attention.key_value": ("crossattention.self.key", "crossattention.self.value"),
    "cross_attention.out": ("crossattention.output.dense",),
    "cross_norm": ("crossattention.output.LayerNorm",),
    "mlp.up": ("intermediate.dense",),
    "mlp.down": ("output.dense",),
    "mlp_norm": ("output.LayerNorm",),
}
_BERT_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
    "norm": "LayerNorm",
}
_LM_HEAD = {"dense.": "transform.dense.", "norm.": "transform.LayerNorm.", "bias": "bias"}
_VISION_BLOCK = {
    "attention.norm.": "ln_1.",
    "attention.qkv.": "attn.in_proj_",
    "attention.out.": "attn.out_proj.",
    "mlp.norm.": "ln_2.",
    "mlp.up.": "mlp.c_fc.",
    "mlp.down.": "mlp.c_proj.",
}
for _i in (1, 2):
    for _ours, _old in (("norm", "ln"), ("down", "down_proj"), ("conv", "conv"), ("up", "up_proj")):
        _VISION_BLOCK[f"local_temporal{_i}.{_ours}."] = f"lmhra{_i}.{_old}."
_VISION = {
    "class_embedding": "class_embedding",
    "position_embedding": "positional_embedding",
    "patch_embedding.weight": "conv1.weight",
    "norm_pre.": "ln_pre.",
    "norm_post.": "ln_post.",
}


def canonical(name: str) -> str:
    """`module.text_encoder.bert.x` -> `text_encoder.x`; all known variants of a name become one."""
    name = name.removeprefix("module.")
    return re.sub(r"^(text_encoder|text_decoder|fusion_encoder)(_m)?\.(bert|fusion)\.", r"\1\2.", name)


def old_names(name: str, *, num_text_layers: int, fusion_start: int) -> tuple[str, ...]:
    """Canonical old names of our parameter `name`, in the order in which they are stacked; () where it had none.

    Args:
        num_text_layers: own layers of the text encoder; the universal layers follow them in the old one.
        fusion_start: index of the first fusion layer that runs; the old module carries unused layers below it.
    """
    part, _, rest = name.partition(".")
    if part == "vision":
        return _vision(rest)
    if part == "text":
        return _bert("text_encoder", rest, 0)
    if part == "universal":
        if rest == "queries":
            return (f"text_encoder.encoder.layer.{num_text_layers}.latents",)
        if rest.startswith("norm."):
            return (f"visn_emb_{rest}",)
        return _bert("text_encoder", rest, num_text_layers)
    if part == "fusion":
        return _bert("fusion_encoder", rest, fusion_start)
    if part == "decoder":
        if rest.startswith("head."):
            return _lm_head("text_decoder", rest.removeprefix("head."))
        return _bert("text_decoder", rest, 0)
    if name.startswith("heads.mlm."):
        return _lm_head("text_encoder", name.removeprefix("heads.mlm."))
    return ()


def _vision(rest: str) -> tuple[str, ...]:
    if rest.startswith(("projection.", "projection_norm.")):
        return (rest.replace("projection_norm", "visn_layer_norm").replace("projection", "visn_fc"),)
    if block := re.match(r"blocks\.(\d+)\.(.*)", rest):
        old = _replace(block[2], _VISION_BLOCK)
        return old and (f"visual_encoder.visual.transformer.resblocks.{block[1]}.{old[0]}",)
    old = _replace(rest, _VISION)
    return old and (f"visual_encoder.visual.{old[0]}",)


def _bert(module: str, rest: str, first_layer: int) -> tuple[str, ...]:
    if rest.startswith("embeddings."):
        _, table, kind = rest.split(".")
        return (f"{module}.embeddings.{_BERT_EMBEDDINGS[table]}.{kind}",)
    if layer := re.match(r"layers\.(\d+)\.(.*)\.(weight|bias)$", rest):
        index = first_layer + int(layer[1])
        return tuple(f"{module}.encoder.layer.{index}.{old}.{layer[3]}" for old in _BERT_LAYER[layer[2]])
    return ()


def _lm_head(module: str, rest: str) -> tuple[str, ...]:
    old = _replace(rest, _LM_HEAD)
    return old and (f"{module}.cls.predictions.{old[0]}",)


def _replace(name: str, table: dict[str, str]) -> tuple[str, ...]:
    for ours, old in table.items():
        if name.startswith(ours):
            return (old + name.removeprefix(ours),)
    return ()
