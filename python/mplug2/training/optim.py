"""Muon for hidden matrices, AdamW for everything else.

Muon (Jordan et al., 2024) replaces the momentum of a matrix by the nearest semi-orthogonal one, found by five
Newton-Schulz steps, so that every direction of a layer moves at the same speed. It is what makes training nano short.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PACKED = {"qkv": 3, "key_value": 2}  # projections that hold several matrices, one after the other


def orthogonalize(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices U V^T of (..., R, C), to some 20 %: the iteration is chosen for speed."""
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    for _ in range(num_steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if is_tall else x


def hidden_matrices(module: nn.Module) -> dict[str, Tensor]:
    """Parameters that Muon takes: weights of linear maps and patch embeddings, but no tables."""
    return {
        f"{name}.weight": child.weight
        for name, child in module.named_modules()
        if isinstance(child, (nn.Linear, nn.Conv3d))
    }


class Optimizer:
    """One optimizer over named parameters, with learning rates given at every step.

    With several processes each orthogonalizes its share of the matrices; a sum over processes puts them together.
    """

    def __init__(self, module: nn.Module, *, weight_decay: float, momentum: float = 0.95):
        matrices = hidden_matrices(module)
        self.names = [n for n, p in module.named_parameters() if n in matrices and p.requires_grad]
        self.matrices = [matrices[n] for n in self.names]
        self.packed = [_PACKED.get(n.split(".")[-2], 1) for n in self.names]
        others = {n: p for n, p in module.named_parameters() if n not in matrices and p.requires_grad}
        self.weight_decay, self.momentum = weight_decay, momentum
        self.velocity = [torch.zeros_like(p) for p in self.matrices]
        groups = [
            {"params": [p for p in others.values() if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in others.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=True)

    @torch.no_grad()
    def step(self, muon_lr: float, adamw_lr: float) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = adamw_lr
        self.adamw.step()
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        updates = [torch.zeros_like(p) for p in self.matrices]
        for i, (p, v) in enumerate(zip(self.matrices, self.velocity, strict=True)):
            v.lerp_(p.grad, 1 - self.momentum)
            if i % world == rank:
                # A packed projection holds several matrices, each orthogonalized alone: (P, R, C).
                update = p.grad.lerp(v, self.momentum).view(self.packed[i], -1, p[0].numel())
                # Equal size of entries whatever the shape: an orthogonal (R, C) has entries of about max(R, C)^-0.5.
                scale = 0.1 * max(update.shape[1:]) ** 0.5
                updates[i] = (orthogonalize(update) * scale).view_as(p)
        sum_over_processes(updates)
        for p, update in zip(self.matrices, updates, strict=True):
            p.mul_(1 - muon_lr * self.weight_decay).add_(update, alpha=-muon_lr)

    def state_dict(self) -> dict:
        return {"velocity": dict(zip(self.names, self.velocity, strict=True)), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        for name, velocity in zip(self.names, self.velocity, strict=True):
            velocity.copy_(state["velocity"][name])
        self.adamw.load_state_dict(state["adamw"])


def sum_over_processes(tensors: list[Tensor], scale: float = 1.0) -> None:
    """Replace every tensor by scale x its sum over all processes, in one message."""
    if not dist.is_initialized():
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    flat.mul_(scale)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(part.view_as(t))


def cosine(step: int, num_steps: int, *, warmup_steps: int, final: float) -> float:
    """Factor of the learning rates: linear from 0 over the warm-up, then a cosine from 1 to `final` at the end."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
