"""PMPQ the obvious way: one whole model a block. The outlier ratio by counting."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def pmpq(model: nn.Module, blocks: str, ids: Tensor, sparsity: float, causal: bool) -> list[float]:
    """Rise of the mean loss of a causal model, or relative change of an encoder's output, block by block."""
    base = model(input_ids=ids).logits
    scores = []
    for index in range(len(model.get_submodule(blocks))):  # type: ignore[arg-type]
        pruned = copy.deepcopy(model)
        for tensor in pruned.get_submodule(f"{blocks}.{index}").parameters():
            entries = tensor.flatten().tolist()
            smallest = sorted(range(len(entries)), key=lambda place: abs(entries[place]))
            for place in smallest[: round(sparsity * len(entries))]:
                entries[place] = 0.0
            tensor.copy_(torch.tensor(entries).view(tensor.shape))
        logits = pruned(input_ids=ids).logits
        if causal:
            scores.append(float(_loss(logits, ids) - _loss(base, ids)))
        else:
            scores.append(float((logits - base).norm() / base.norm()))
    return scores


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), ids[:, 1:].flatten())


def outlier_ratio(weight: Tensor, norms: Tensor, threshold: float) -> float:
    scores = [
        abs(w) * norm for row in weight.double().tolist() for w, norm in zip(row, norms.double().tolist(), strict=True)
    ]
    mean = sum(scores) / len(scores)
    return sum(score > threshold * mean for score in scores) / len(scores)
