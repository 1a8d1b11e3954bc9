"""The table "task -> modules", and `compose`, which builds the modules of some tasks and only those.

parts = mplug2.compose(["video-qa"], "large")
out = parts(video=video, text=question_ids, labels=answer_ids)
out.loss.backward()
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug2.config import ModelConfig, get_config
from mplug2.modules.decoder import Context, Decoder
from mplug2.modules.fusion import Fusion, join_masks
from mplug2.modules.heads import HEADS
from mplug2.modules.layers import Block
from mplug2.modules.text import TextEncoder
from mplug2.modules.universal import UniversalLayers
from mplug2.modules.vision import VisionEncoder


@dataclass(frozen=True)
class Composition:
    """One row of the table: what a task reads, and which modules it is made of."""

    vision: str | None  # "video", "image", "images" (a pair), "either" or None
    text: str | None  # what the text is to this task, or None
    universal: tuple[str, ...]  # modalities that pass through the universal layers
    fusion: bool = False
    decoder: bool = False
    heads: tuple[str, ...] = ()
    optional: bool = False  # any of its inputs may be left out

    def cells(self) -> tuple[str, ...]:
        universal = "both" if len(self.universal) == 2 else self.universal[0]
        heads = ", ".join((("LM",) if self.decoder else ()) + self.heads) or "none"
        yes = {True: "yes", False: "-"}
        return (self.vision or "-", self.text or "-", universal, yes[self.fusion], yes[self.decoder], heads)


_BOTH = ("vision", "text")
_RETRIEVAL = ("contrastive", "matching")

COMPOSITIONS: dict[str, Composition] = {
    "video-captioning": Composition("video", None, ("vision",), decoder=True),
    "image-captioning": Composition("image", None, ("vision",), decoder=True),
    "video-qa": Composition("video", "question", _BOTH, fusion=True, decoder=True),
    "visual-qa": Composition("image", "question", _BOTH, fusion=True, decoder=True),
    "image-text-retrieval": Composition("image", "caption", _BOTH, fusion=True, heads=_RETRIEVAL),
    "video-text-retrieval": Composition("video", "caption", _BOTH, fusion=True, heads=_RETRIEVAL),
    "visual-grounding": Composition("image", "expression", _BOTH, fusion=True, decoder=True),
    "visual-entailment": Composition("image", "sentence", _BOTH, fusion=True, heads=("text_classes",)),
    "nlvr": Composition("images", "sentence", _BOTH, fusion=True, heads=("text_classes", "image_index")),
    "image-classification": Composition("image", None, ("vision",), heads=("vision_classes",)),
    "video-classification": Composition("video", None, ("vision",), heads=("vision_classes",)),
    "text-classification": Composition(None, "text", ("text",), heads=("text_classes",)),
    "text-generation": Composition(None, "text", ("text",), decoder=True),
    "pretraining": Composition("either", "text", _BOTH, fusion=True, decoder=True, heads=(*_RETRIEVAL, "mlm")),
    "feature-extraction": Composition("either", "text", _BOTH, optional=True),
}


def composition_table() -> str:
    """The whole table in Markdown, one row per task; captioning with an instruction is composed as visual QA is."""
    rows = [("task", "vision", "text", "universal", "fusion", "decoder", "heads"), ("---",) * 7]
    rows += [(f"`{task}`", *composition.cells()) for task, composition in COMPOSITIONS.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass
class Output:
    """What a forward gives: the summed loss and its terms by name, class logits, embeddings by name."""

    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    embeddings: dict[str, Tensor] = field(default_factory=dict)


class Parts(nn.Module):
    """The modules of some tasks: `vision`, `text`, `universal`, `fusion`, `decoder` (None if not needed), `heads`."""

    def __init__(self, compositions: dict[str, Composition], config: ModelConfig):
        super().__init__()
        self.config = replace(config, tasks=tuple(compositions))
        self.compositions = compositions
        rows = compositions.values()
        heads = [name for row in rows for name in row.heads]
        vision, text = any(row.vision for row in rows), any(row.text for row in rows)
        if not config.num_classes and (missing := [h for h in heads if h.endswith("_classes")]):
            raise ValueError(f"compose: head {missing[0]!r} needs config.num_classes > 0")
        drop = config.dropout
        self.vision = VisionEncoder(config.vision, output_width=config.text.width) if vision else None
        self.text = TextEncoder(config.text, dropout=drop) if text else None
        self.universal = UniversalLayers(config.universal, config.text, has_vision=vision, dropout=drop)
        self.fusion = Fusion(config.fusion, config.text, dropout=drop) if any(row.fusion for row in rows) else None
        self.decoder = None
        if any(row.decoder for row in rows):
            word = self.text.embeddings.word if text and config.share_embeddings else None
            self.decoder = Decoder(config.decoder, config.text, word=word, dropout=drop)
        self.heads = nn.ModuleDict({name: HEADS[name](config) for name in dict.fromkeys(heads)})

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input in training and compute the rest again in the backward."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = enable

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.compositions)

    def composition(self, task: str | None) -> Composition:
        """The row of a task these parts were composed for; None where there is only one."""
        if task is None and len(self.compositions) == 1:
            return next(iter(self.compositions.values()))
        if task not in self.compositions:
            raise ValueError(f"parts: task must be one of {', '.join(self.tasks)}, got {task!r}")
        return self.compositions[task]

    def encode_vision(self, video: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) -> visual tokens (B, 1 + T * grid^2, D) after the universal layers."""
        return self.universal.vision(self.vision(video))

    def encode_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Ids (B, S) -> states (B, S, D) after the universal layers; mask defaults to ids != 0."""
        mask = _text_mask(ids, mask)
        return self.universal.text(self.text(ids, mask), mask)

    def fuse(
        self, visual: Tensor | None, text: Tensor | None, text_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Context tokens and mask: the visual tokens, the text states, or of both [visual; fused text]."""
        if visual is None or text is None:
            return (visual, None) if text is None else (text, text_mask)
        visual, text = self.fusion(visual, text, text_mask=text_mask)
        return torch.cat([visual, text], 1), join_masks(visual, None, text, text_mask)

    def context(self, **inputs) -> Context:
        """What the decoder reads for these inputs (see `context_tokens`): the keys and values of every layer, projected
        once."""
        tokens, mask = self.context_tokens(**inputs)  # says so where there is no decoder
        return self.decoder.project(tokens, mask)

    def context_tokens(
        self,
        *,
        video: Tensor | None = None,
        visual: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        task: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, K, D) that the decoder attends to, and their mask (B, K) or None.

        Args:
            visual: tokens that `encode_vision` made, instead of video.
            text, text_mask: ids (B, S) and their mask (default: ids != 0).
        """
        row = self.composition(task)
        if not row.decoder:
            raise ValueError(f"parts: {task or self.tasks[0]} has no decoder")
        _check_inputs(row, video if visual is None else visual, text)
        if visual is None and row.vision:
            visual = self.encode_vision(video)
        mask = _text_mask(text, text_mask)
        states = None if text is None else self.encode_text(text, mask)
        return self.fuse(visual, states, mask)

    def forward(
        self,
        *,
        video: Tensor | None = None,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        labels: Tensor | None = None,
        label_counts: Tensor | None = None,
        label_weights: Tensor | None = None,
        prompt_length: int = 0,
        task: str | None = None,
    ) -> Output:
        """Loss, class logits or embeddings of one batch.

        Args:
            video: (B, 3, T, H, W), normalised; an image is T = 1; for `nlvr` (B, 2, 3, T, H, W).
            text, text_mask: ids (B, S) and their mask (default: ids != 0).
            labels: decoder tasks: ids (R, S) from the start token on, padding 0; class tasks: (B,) int64.
            label_counts: (B,) number of consecutive label rows per item (default: R / B each).
            label_weights: (R,) weights; the loss is then sum(weight * summed cross-entropy) / B, as in QA training.
            prompt_length: number of leading positions of labels that are not targets.
            task: needed where the parts were composed for several tasks.
        """
        row = self.composition(task)
        if row.decoder:
            if labels is None:
                raise ValueError(f"parts: {task or self.tasks[0]} needs labels (R, S)")
            context = self.context(video=video, text=text, text_mask=text_mask, task=task)
            loss = self._decoder_loss(context, labels, label_counts, label_weights, prompt_length)
            return Output(loss=loss, losses={"lm": loss})
        _check_inputs(row, video, text)
        visual = None
        if row.vision == "images":
            visual = torch.cat([self.encode_vision(video[:, i]) + self.heads.image_index.weight[i] for i in (0, 1)], 1)
        elif video is not None:
            visual = self.encode_vision(video)
        mask = _text_mask(text, text_mask)
        states = None if text is None else self.encode_text(text, mask)
        return self._head_output(row, visual, states, mask, labels)

    def _decoder_loss(self, context, labels, counts, weights, prompt_length) -> Tensor:
        items = len(context)
        if counts is not None and not (counts == labels.shape[0] // items).all():
            context = context.select(torch.repeat_interleave(counts))
        targets = labels.masked_fill(labels == 0, -100)
        targets[:, :prompt_length] = -100
        if weights is None:
            return self.decoder.loss(labels, context, targets)
        return (weights * self.decoder.loss(labels, context, targets, reduction="row")).sum() / items

    def _head_output(self, row, visual, states, mask, labels) -> Output:
        out = Output()
        if visual is not None:
            out.embeddings["vision"] = visual[:, 0]
        if states is not None:
            out.embeddings["text"] = states[:, 0]
        fused = states
        if row.fusion:
            _, fused = self.fusion(visual, states, text_mask=mask)
            out.embeddings["fused"] = fused[:, 0]
        if "contrastive" in row.heads:
            head = self.heads.contrastive
            out.embeddings["vision_aligned"], out.embeddings["text_aligned"] = head(visual, states)
            out.logits = self.heads.matching(fused)
        elif "vision_classes" in row.heads:
            out.logits = self.heads.vision_classes(visual)
        elif "text_classes" in row.heads:
            out.logits = self.heads.text_classes(fused)
        if labels is not None and out.logits is not None:
            regression = out.logits.shape[1] == 1
            out.loss = F.mse_loss(out.logits[:, 0], labels) if regression else F.cross_entropy(out.logits, labels)
            out.losses["regression" if regression else "classes"] = out.loss
        return out


def _check_inputs(row: Composition, video: Tensor | None, text: Tensor | None) -> None:
    for name, value, wanted in (("video", video, row.vision), ("text", text, row.text)):
        if value is None and wanted and not row.optional:
            raise ValueError(f"parts: this task needs {name} ({wanted})")
        if value is not None and not wanted:
            raise ValueError(f"parts: this task takes no {name}")


def _text_mask(ids: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """True where a word piece stands."""
    if ids is None:
        return None
    return ids != 0 if mask is None else mask.bool()


@torch.no_grad()
def init_parameter(name: str, p: nn.Parameter) -> None:
    """Random start of one parameter of `Parts`, by its name: matrices and tables N(0, 0.02), norms 1 and 0, biases 0,
    queries N(0, 1), temperature 0.07, taps of the temporal convolution U(-3^-0.5, 3^-0.5). Local temporal modules start
    as the identity: their last map is 0."""
    module, _, kind = name.rpartition(".")
    if kind == "bias" or re.search(r"local_temporal\d\.up\.weight$", name):
        p.zero_()
    elif "norm" in module.rpartition(".")[2]:
        p.fill_(1.0)
    elif kind == "temperature":
        p.fill_(0.07)
    elif re.search(r"local_temporal\d\.conv\.weight$", name):
        p.uniform_(-(3**-0.5), 3**-0.5)  # as any convolution of 3 taps: 0.02 would keep frames apart for long
    else:
        p.normal_(0.0, 1.0 if kind == "queries" else 0.02)


def list_tasks() -> list[str]:
    """The names of all tasks that `compose` knows."""
    return list(COMPOSITIONS)


def get_compositions(tasks: Sequence[str] | str, *, instruction: bool) -> dict[str, Composition]:
    """The rows of some tasks; unknown names are a ValueError that lists the known ones."""
    if isinstance(tasks, str):
        tasks = [tasks]
    if not tasks:
        raise ValueError("compose: at least one task is needed")
    for task in tasks:
        if task not in COMPOSITIONS:
            raise ValueError(f"compose: unknown task {task!r}; tasks are {', '.join(COMPOSITIONS)}")
    rows = {task: COMPOSITIONS[task] for task in tasks}
    if instruction:
        rows = {
            task: replace(row, text="instruction", universal=_BOTH, fusion=True) if task.endswith("captioning") else row
            for task, row in rows.items()
        }
    return rows


def compose(
    tasks: Sequence[str] | str,
    config: str | ModelConfig,
    *,
    instruction: bool | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    init: bool = True,
) -> Parts:
    """Build the modules of one or several tasks, and only those.

    Args:
        tasks: names of the table's rows.
        config: a preset's name, a folder with config.json, or a ModelConfig.
        instruction: captioning tasks also read an instruction, through text encoder and fusion (default: as the config
            says).
        device, dtype: where and as what the parameters are made (default: torch's default dtype).
        init: random weights from torch's global generator; False leaves the parameters on the meta device.
    """
    config = get_config(config)
    if instruction is not None:
        config = replace(config, instruction=instruction)
    with torch.device("meta"):
        parts = Parts(get_compositions(tasks, instruction=config.instruction), config)
    parts = parts.to(dtype or torch.get_default_dtype())
    if init:
        parts.to_empty(device=device)
        for name, p in parts.named_parameters():
            init_parameter(name, p)
    return parts
