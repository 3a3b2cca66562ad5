"""Embeddings, their fidelity, a head and what rounding costs an encoder, the obvious way, in float64."""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.reference.quantization import rtn
from tests.reference.sensitivity import parts


def embeddings(model: nn.Module, sentences: list[Tensor]) -> Tensor:
    """float64 [N, d]: all sentences padded to one batch, the mean over each one's own tokens, scaled to length 1."""
    longest = max(len(sentence) for sentence in sentences)
    ids, real = torch.zeros(2, len(sentences), longest, dtype=torch.long)
    for row, sentence in enumerate(sentences):
        ids[row, : len(sentence)] = sentence
        real[row, : len(sentence)] = 1
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states[-1].double()
    rows = []
    for row, sentence in enumerate(sentences):
        mean = sum(states[row, place] for place in range(len(sentence))) / len(sentence)
        rows.append(mean / math.sqrt(sum(float(entry) ** 2 for entry in mean)))
    return torch.stack(rows)


def fidelity(altered: Tensor, dense: Tensor) -> tuple[float, float]:
    """Mean cosine, and Spearman's correlation of the similarities of all pairs, which must not be tied."""
    cosines = [_dot(one, other) for one, other in zip(altered, dense, strict=True)]
    ranks = []
    for vectors in (altered, dense):
        similar = [_dot(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i)]
        ranks.append([sum(other < own for other in similar) for own in similar])
    count = len(ranks[0])
    apart = sum((one - other) ** 2 for one, other in zip(*ranks, strict=True))
    return sum(cosines) / len(cosines), 1 - 6 * apart / (count * (count**2 - 1))


def head(features: Tensor, labels: list[int], penalty: float, steps: int = 20000) -> tuple[Tensor, Tensor]:
    """Logistic regression by plain gradient descent: weight [classes, d] and bias [classes]."""
    classes = max(labels) + 1
    weight, bias = torch.zeros(classes, features.shape[1]).double(), torch.zeros(classes).double()
    wanted = torch.eye(classes).double()[labels]
    for _ in range(steps):
        logits = features.double() @ weight.T + bias
        chances = logits.exp() / logits.exp().sum(1, keepdim=True)
        slope = (chances - wanted) / len(labels)
        weight = weight - (slope.T @ features.double() + penalty * weight)
        bias = bias - slope.sum(0)
    return weight, bias


def tdmpq(model: nn.Module, blocks: str, ids: Tensor, bits: int, group_size: int, probes: list[Tensor]) -> dict:
    """1/2 <F, dW^2> by layer, F the mean of the squared gradients of <r, e>, a probe r [d] for each sequence."""
    names, moved, model = _moved(model, blocks, bits, group_size)
    weights = [model.get_parameter(f"{layer}.weight") for layer in names]
    costs = dict.fromkeys(names, 0.0)
    for embedding, probe in zip(_with_graph(model, ids), probes, strict=True):
        gradients = torch.autograd.grad(embedding @ probe.double(), weights)
        for layer, gradient in zip(names, gradients, strict=True):
            costs[layer] += float((gradient**2 * moved[layer] ** 2).sum()) / 2 / len(ids)
    return costs


def rounding_loss(model: nn.Module, blocks: str, ids: Tensor, bits: int, group_size: int) -> dict[str, float]:
    """What is really lost when a layer alone is rounded: mean of 1 - cosine with the dense embeddings, by layer."""
    names, moved, model = _moved(model, blocks, bits, group_size)
    with torch.no_grad():
        dense = torch.stack(list(_with_graph(model, ids)))
        found = {}
        for layer in names:
            weight = model.get_parameter(f"{layer}.weight")
            weight += moved[layer]
            found[layer] = 1 - float((torch.stack(list(_with_graph(model, ids))) * dense).sum(1).mean())
            weight -= moved[layer]
    return found


def _moved(model: nn.Module, blocks: str, bits: int, group_size: int) -> tuple[list[str], dict[str, Tensor], nn.Module]:
    """Layers, what rounding moves their weights by, and the model in float64."""
    names = [layer for _, layers in parts(model, blocks, "block") for layer in layers]
    model = copy.deepcopy(model).double()
    moved = {}
    for layer in names:
        weight = model.get_parameter(f"{layer}.weight").detach()
        moved[layer] = rtn(weight.float(), bits, group_size)[2].double() - weight
    return names, moved, model


def _with_graph(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Embedding [d] of each sequence, one after the other."""
    for sequence in ids.split(1):
        mean = model(input_ids=sequence, output_hidden_states=True).hidden_states[-1][0].mean(0)
        yield mean / mean.norm()


def _dot(one: Tensor, other: Tensor) -> float:
    return sum(float(a) * float(b) for a, b in zip(one, other, strict=True))
