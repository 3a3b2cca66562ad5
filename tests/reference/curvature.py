"""A and G the obvious way: plain autograd on the whole model in float64, token by token, and dense Fisher matrices."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tokens(NamedTuple):
    """What a layer sees of every token: inputs [n, c], behind them a 1 if it has a bias, and gradients [n, R]."""

    inputs: Tensor
    gradients: Tensor


def tokens(model: nn.Module, layers: Sequence[str], ids: Tensor, labels: Tensor | None = None) -> dict[str, Tokens]:
    """By layer, float64. The loss is summed over a sequence; labels [N, T - 1] are its own next tokens unless given."""
    labels = ids[:, 1:] if labels is None else labels

    def loss(logits: Tensor, row: int) -> Tensor:
        log_p = logits.log_softmax(-1)
        return -sum(log_p[place, label] for place, label in enumerate(labels[row].tolist()))

    return _tokens(model, layers, ids, loss)


def inputs(model: nn.Module, layers: Sequence[str], ids: Tensor) -> dict[str, Tensor]:
    """float64 [n, c] by layer; an encoder has them, too."""
    return {layer: own.inputs for layer, own in _tokens(model, layers, ids, lambda logits, _: logits.sum()).items()}


def factors(own: Tokens) -> tuple[Tensor, Tensor]:
    """A and G as if inputs and gradients were independent."""
    return _mean_outer(own.inputs), _mean_outer(own.gradients)


def weighted(own: Tokens) -> tuple[Tensor, Tensor]:
    """A and G with A such that G (x) A, traced over outputs, is the Fisher matrix traced over outputs."""
    rows, width = own.gradients.shape[1], own.inputs.shape[1]
    G = _mean_outer(own.gradients)
    traced = fisher(own).view(rows, width, rows, width).diagonal(dim1=0, dim2=2).sum(-1)
    return traced / G.trace(), G


def exact_outputs(model: nn.Module, layer: str, ids: Tensor) -> Tensor:
    """G [R, R] under the model's own predictions, summed over the vocabulary.

    Labels are drawn independently at each place and their gradients have mean zero, so places add up.
    """
    model, taken = _watched(model, [layer])
    total = torch.zeros(())
    for sequence in ids.split(1):
        log_p = model(input_ids=sequence).logits[0].log_softmax(-1)
        for entry in log_p[:-1].flatten():
            (slope,) = torch.autograd.grad(entry, taken[layer][1], retain_graph=True)
            total = total + entry.detach().exp() * _mean_outer(slope.flatten(0, -2)) / len(ids)
    return total


def fisher(own: Tokens) -> Tensor:
    """Mean over tokens of (g g^T) (x) (a a^T), [R c, R c]."""
    whole = [torch.outer(g, a).flatten() for g, a in zip(own.gradients, own.inputs, strict=True)]
    return _mean_outer(torch.stack(whole))


def nearest(fisher: Tensor, rows: int) -> Tensor:
    """The Kronecker product of [R, R] and [c, c] that is nearest to a matrix [R c, R c]: the leading singular pair of
    its blocks, each written as a row (Van Loan and Pitsianis)."""
    width = len(fisher) // rows
    blocks = fisher.view(rows, width, rows, width).transpose(1, 2).reshape(rows * rows, width * width)
    left, values, right = torch.linalg.svd(blocks, full_matrices=False)
    return torch.kron(values[0] * left[:, 0].view(rows, rows), right[0].view(width, width))


def refined(own: Tokens, passes: int) -> tuple[Tensor, Tensor]:
    """A and G after half steps of the power iteration."""
    A, G = factors(own)
    for turn in range(passes):
        if turn % 2 == 0:
            weights = [a @ A @ a for a in own.inputs]
            G = _mean_outer(own.gradients, weights) / (A**2).sum()
        else:
            weights = [g @ G @ g for g in own.gradients]
            A = _mean_outer(own.inputs, weights) / (G**2).sum()
    return A, G


def _tokens(
    model: nn.Module, layers: Sequence[str], ids: Tensor, loss: Callable[[Tensor, int], Tensor]
) -> dict[str, Tokens]:
    model, taken = _watched(model, layers)
    found: dict[str, list[Tokens]] = {layer: [] for layer in layers}
    for row, sequence in enumerate(ids.split(1)):
        logits = model(input_ids=sequence).logits[0]
        slopes = torch.autograd.grad(loss(logits, row), [taken[layer][1] for layer in layers])
        for layer, slope in zip(layers, slopes, strict=True):
            seen = taken[layer][0].flatten(0, -2)
            if model.get_submodule(layer).bias is not None:
                seen = torch.cat([seen, torch.ones(len(seen), 1)], 1)
            found[layer].append(Tokens(seen, slope.flatten(0, -2)))
    return {layer: Tokens(*(torch.cat(side) for side in zip(*own, strict=True))) for layer, own in found.items()}


def _watched(model: nn.Module, layers: Sequence[str]) -> tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]:
    """The model in float64, and where each run of it puts the layers' inputs and outputs."""
    model = copy.deepcopy(model).double()
    taken: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(layer: str) -> Callable[..., None]:
        return lambda _module, inputs, output: taken.update({layer: (inputs[0].detach(), output)})

    for layer in layers:
        model.get_submodule(layer).register_forward_hook(watch(layer))
    return model, taken


def _mean_outer(rows: Tensor, weights: list[Tensor] | None = None) -> Tensor:
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for place, row in enumerate(rows):
        total += torch.outer(row, row) * (1 if weights is None else weights[place])
    return total / len(rows)
