"""The loss of one step: what each kind of data asks of the modules."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mplug2.composition import Parts
from mplug2.data.clothes import batches
from mplug2.data.clothes.pictures import ITEMS, Pictures
from mplug2.data.clothes.scripts import COLORS, MOTIONS, QUESTIONS, Scripts
from mplug2.data.text import END, Tokenizer
from mplug2.modules import VisionEncoder
from mplug2.training.recipe import Recipe, Stage


class Trainee(nn.Module):
    """The modules being trained, and the class heads on the vision encoder, which are thrown away afterwards."""

    def __init__(self, parts: Parts):
        super().__init__()
        self.parts = parts
        self.classes = nn.Linear(parts.config.vision.width, len(ITEMS) + len(COLORS))
        self.motions = nn.Linear(parts.config.vision.width, len(MOTIONS))

    def select(self, stage: Stage) -> None:
        """Only what a stage trains asks for gradients: crops the spatial tower, stills all but the local temporal
        modules, which stay the identity until clips give them something to do."""
        for name, p in self.named_parameters():
            is_spatial = name.startswith("parts.") and ".local_temporal" not in name
            is_tower, is_classes = is_spatial and name.startswith("parts.vision."), name.startswith("classes.")
            p.requires_grad_({"crops": is_tower or is_classes, "stills": is_spatial, "clips": True}[stage.data])


class Step:
    """Losses of a stage, ready for backward; `rng` decides every draw, so that a step can be repeated."""

    def __init__(self, recipe: Recipe, trainee: Trainee, tokenizer: Tokenizer, pictures: Pictures):
        self.recipe, self.trainee, self.tokenizer, self.pictures = recipe, trainee, tokenizer, pictures

    def backward(self, stage: Stage, rng: np.random.Generator) -> dict[str, float]:
        """Draw this process's share of a batch, accumulate gradients, and return the losses by name."""
        config, share = self.trainee.parts.config.vision, self.recipe.num_processes
        count, num_stills = stage.batch_size // share, stage.still_batch_size // share
        num_crops = stage.crop_batch_size // share
        losses: dict[str, Tensor] = {}
        if stage.data == "crops":
            losses = self._crop_losses(count, rng)
        elif stage.data == "stills":
            losses = self._still_losses(count, rng)
        else:
            batch = batches.clips(self.pictures, count, config, rng, codec_share=stage.codec_share)
            tokens = encode_kept(self.trainee.parts.vision, batch.video, stage.kept_patches)
            losses = self._text_losses(tokens, batch.scripts, rng, is_video=True)
            losses |= self._class_losses(tokens.mean(1), batch.scripts, with_motion=True)
        sum(losses.values()).backward()
        if num_stills:
            extra = self._still_losses(num_stills, rng)
            (stage.still_weight * sum(extra.values())).backward()
            losses |= {f"still_{name}": loss for name, loss in extra.items()}
        if num_crops:
            extra = self._crop_losses(num_crops, rng)
            sum(extra.values()).backward()
            losses |= {f"crop_{name}": loss for name, loss in extra.items()}
        return {name: loss.item() for name, loss in losses.items()}

    def _crop_losses(self, count: int, rng: np.random.Generator) -> dict[str, Tensor]:
        vision = self.trainee.parts.vision
        batch = batches.crops(self.pictures, count, vision.config, rng)
        return self._class_losses(encode_crops(vision, batch.video, rng), batch.scripts)

    def _still_losses(self, count: int, rng: np.random.Generator) -> dict[str, Tensor]:
        vision = self.trainee.parts.vision
        batch = batches.stills(self.pictures, count, vision.config, rng)
        return self._text_losses(vision(batch.video), batch.scripts, rng, is_video=False)

    def _class_losses(self, features: Tensor, scripts: Scripts, *, with_motion: bool = False) -> dict[str, Tensor]:
        """Cross-entropies of class heads on features (B, D) of the vision encoder."""
        items, colors = self.trainee.classes(features).split([len(ITEMS), len(COLORS)], 1)
        smoothing = self.recipe.label_smoothing
        losses = {
            "item": F.cross_entropy(items, torch.from_numpy(scripts.item), label_smoothing=smoothing),
            "color": self.recipe.color_weight * F.cross_entropy(colors, torch.from_numpy(scripts.color)),
        }
        if with_motion:
            losses["motion"] = F.cross_entropy(self.trainee.motions(features), torch.from_numpy(scripts.motion))
        return losses

    def _text_losses(
        self, tokens: Tensor, scripts: Scripts, rng: np.random.Generator, *, is_video: bool
    ) -> dict[str, Tensor]:
        """Caption and one question a clip, over one pass of the vision encoder, whose tokens (B, K, D) are given."""
        parts = self.trainee.parts
        captions = scripts.captions() if is_video else scripts.still_captions()
        questions, answers = ask(scripts, rng, num_questions=3 if is_video else 2)
        visual = parts.universal.vision(tokens)
        text = self.tokenizer(questions)
        states = parts.encode_text(text.ids, text.mask)
        fused = parts.fuse(visual, states, text.mask)
        return {
            "caption": self._language_loss(captions, (visual, None)),
            "answer": self._language_loss(answers, fused),
        }

    def _language_loss(self, texts: list[str], tokens: tuple[Tensor, Tensor | None]) -> Tensor:
        ids = self.tokenizer([text + END for text in texts]).ids
        decoder = self.trainee.parts.decoder
        return decoder.loss(ids, decoder.project(*tokens), ids.masked_fill(ids == 0, -100))


def encode_crops(vision: VisionEncoder, crops: Tensor, rng: np.random.Generator) -> Tensor:
    """Mean tokens (B, D) of crops (B, 3, 1, H, W), whose patches sit at a random place of the grid of a whole frame.

    An item fills a quarter of a frame, so a crop costs a quarter of its frame and teaches the same. Every token is
    made to know the item, as the decoder will ask all of them: a class head on their mean learns faster than one on the
    class token (docs/nano.md).
    """
    patches = F.conv3d(crops, vision.patch_embedding.weight, stride=vision.patch_embedding.stride).squeeze(2)
    count, width, side, _ = patches.shape
    grid = vision.config.grid_size
    row, column = torch.from_numpy(rng.integers(0, grid - side + 1, (2, count, 1, 1)))
    at = torch.arange(side)
    place = 1 + ((row + at[:, None]) * grid + column + at).flatten(1)
    position = torch.cat((vision.position_embedding[:1].expand(count, 1, -1), vision.position_embedding[place]), 1)
    cls = vision.class_embedding.expand(count, 1, width)
    x = vision.norm_pre(torch.cat((cls, patches.flatten(2).mT), 1) + position)[:, None]
    for block in vision.blocks:
        x = block(x)
    return vision.norm_post(x[:, 0]).mean(1)


def encode_kept(vision: VisionEncoder, video: Tensor, count: int) -> Tensor:
    """Visual tokens (B, 1 + T * count, D) of the `count` patch positions with most contrast, the same in every frame.

    Contrast is the variance of a position's pixels over place and time. With half of the positions a clip costs half,
    and what is left out is background. count 0 keeps all.
    """
    x = vision.embed(video)
    if count:
        grid = vision.config.grid_size
        cells = video.unflatten(-2, (grid, -1)).unflatten(-1, (grid, -1))  # (B, 3, T, grid, h, grid, w)
        contrast = cells.var((2, 4, 6)).sum(1).flatten(1)
        kept = 1 + contrast.topk(count, 1).indices.sort(1).values
        kept = torch.cat((kept.new_zeros(len(kept), 1), kept), 1)[:, None, :, None]
        x = x.gather(2, kept.expand(-1, x.shape[1], -1, x.shape[3]))
    for block in vision.blocks:
        x = block(x)
    return vision.pool(x)


def ask(scripts: Scripts, rng: np.random.Generator, *, num_questions: int) -> tuple[list[str], list[str]]:
    """One of the first num_questions QUESTIONS a clip, and its answer. Half the questions lack the question mark, half
    end in [SEP]: users and cleaning differ in both."""
    which = rng.integers(0, num_questions, len(scripts))
    bare, ended = rng.random((2, len(scripts))) < 0.5
    questions = [
        (QUESTIONS[q].rstrip("?") if b else QUESTIONS[q]) + (END if e else "")
        for q, b, e in zip(which, bare, ended, strict=True)
    ]
    return questions, [answers[q] for q, answers in zip(which, scripts.answers(), strict=True)]
