"""PERP's retraining as its released code goes about it, re-stated from its description.

The whole model in float32, the forward pass under bfloat16 autocast; every adapted layer finds its mask and its dense
effective weight anew at each forward, in plain operations whose results autograd keeps; the loss is transformers' own,
over all logits in float32. It stands for that code in benchmarks/perp.py. Two differences: there is no adapter on
the head (merged, it corrupts tied embeddings), and the model is written, which the released code never does.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

LEARNING_RATE, FULL_LEARNING_RATE = 5e-4, 5e-5
WARMUP, CLIP = 0.1, 1.0
METHODS = ("norms", "full", "lora", "lora_prune", "mask_lora", "scale_lora")


def retrain(
    source: Path,
    method: str,
    draw: Callable[[int], Tensor],
    folder: Path,
    steps: int,
    learning_rate: float | None = None,
    accumulate: bool = False,
) -> dict[str, Any]:
    """Retrains `source` into `folder`.

    Args:
        method: one of METHODS; norms and biases learn in each of them.
        draw: ids int64 [N, T] of a step.
        learning_rate: its peak; by default the released one.
        accumulate: the released default, a sequence at a time with gradient checkpointing, and one optimiser step
            for all N; otherwise all N at once, nothing checkpointed.

    Returns:
        trainable_parameters, trainable_share of the parameters there were, losses by step, and training_s: wall time
        from the making of the optimiser to the last step.
    """
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).train()
    model.config.use_cache = False
    if accumulate:
        model.gradient_checkpointing_enable()
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = make_trainable(model, method)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate = learning_rate or (FULL_LEARNING_RATE if method == "full" else LEARNING_RATE)
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(WARMUP * steps), steps)
    losses = []
    for step in range(steps):
        ids = draw(step)
        parts = ids.split(1) if accumulate else (ids,)
        seen = 0.0
        for part in parts:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=part, labels=part).loss / len(parts)
            loss.backward()
            seen += loss.item()
        nn.utils.clip_grad_norm_(learning, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(seen)
    training = time.perf_counter() - began
    merge(model, layers)
    model.to(torch.bfloat16).save_pretrained(folder)
    count = sum(parameter.numel() for parameter in learning)
    return {
        "trainable_parameters": count,
        "trainable_share": count / total,
        "losses": losses,
        "training_s": training,
    }


def make_trainable(model: nn.Module, method: str, rank: int = 16, alpha: float = 32) -> dict[str, nn.Module]:
    """Frees what `method` trains; the layers that have taken the place of the blocks' linears, by name."""
    model.requires_grad_(method == "full")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or name.endswith(".bias"):
            parameter.requires_grad_(True)
    if method == "norms":
        return {}
    layers: dict[str, nn.Module] = {}
    for name, linear in list(model.model.layers.named_modules()):  # type: ignore[union-attr, operator]
        if isinstance(linear, nn.Linear):
            layers[name] = Masked(linear) if method == "full" else FORMS[method](linear, rank, alpha)
            replace(model, name, layers[name])
    return layers


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` at `name`, a path from the list of blocks."""
    parent, _, child = f"model.layers.{name}".rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@torch.no_grad()
def merge(model: nn.Module, layers: dict[str, Any]) -> None:
    """Puts plain linears back, with what was learned in their weights."""
    for name, layer in layers.items():
        linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=layer.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(layer.merged()), layer.bias
        replace(model, name, linear)


class Masked(nn.Module):
    """Full fine-tuning with the mask kept by reparametrisation: the weight is a parameter times a float mask."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.register_buffer("mask", (linear.weight != 0).to(linear.weight.dtype))

    def merged(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.merged(), self.bias)


class MaskLora(nn.Module):
    """W + s M o (B A), one linear call; A uniform as nn.Linear's weights, B zero."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = linear.weight, linear.bias, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.start()

    def start(self) -> None:
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def mask(self) -> Tensor:
        return self.weight != 0

    def effective(self) -> Tensor:
        return self.weight + self.scaling * (self.mask() * (self.B @ self.A))

    def merged(self) -> Tensor:
        return self.effective()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.effective(), self.bias)


class LoraPrune(MaskLora):
    """W + s B A while it learns, cut down to the mask at the merge."""

    def effective(self) -> Tensor:
        return self.weight + self.scaling * (self.B @ self.A)

    def merged(self) -> Tensor:
        return self.weight + self.scaling * (self.mask() * (self.B @ self.A))


class Lora(MaskLora):
    """The ordinary adapter, W x + s B (A x); merged here to be judged, which makes the weight dense."""

    def effective(self) -> Tensor:
        return self.weight + self.scaling * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(x, self.A), self.B)


class ScaleLora(MaskLora):
    """W o (B A); every entry of A and B starts at 1 / sqrt(r), so the ranks stay equal for ever."""

    def start(self) -> None:
        nn.init.constant_(self.A, 1 / math.sqrt(len(self.A)))
        nn.init.constant_(self.B, 1 / math.sqrt(len(self.A)))

    def effective(self) -> Tensor:
        return self.weight * (self.B @ self.A)


FORMS = {"lora": Lora, "lora_prune": LoraPrune, "mask_lora": MaskLora, "scale_lora": ScaleLora}
