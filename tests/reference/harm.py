"""Logistic regression by Newton's method on the two-class problem, and the rates of harm by counting."""

import math

import torch
from torch import Tensor


def probabilities(features: Tensor, labels: Tensor, penalty: float, asked: Tensor, steps: int = 50) -> Tensor:
    """float64 [n] for `asked` [n, d]: minimises the loss, both classes alike, and penalty / 2 of their squared weights.

    At the best the two classes' weights are each other's negative, w / 2 and -w / 2: the penalty is penalty / 4 w'w.
    """
    inputs, truth = features.double(), labels.double()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    ridge = torch.full((inputs.shape[1],), penalty / 2, dtype=torch.float64)
    ridge[-1] = 0
    share = torch.tensor([1 / (2 * int((truth == label).sum())) for label in truth.tolist()], dtype=torch.float64)
    weight = torch.zeros(inputs.shape[1], dtype=torch.float64)
    for _ in range(steps):
        found = torch.tensor([1 / (1 + math.exp(-float(row @ weight))) for row in inputs], dtype=torch.float64)
        gradient = inputs.T @ (share * (found - truth)) + ridge * weight
        curvature = inputs.T @ torch.diag(share * found * (1 - found)) @ inputs + torch.diag(ridge)
        weight = weight - torch.linalg.solve(curvature, gradient)
    rows = torch.cat([asked.double(), torch.ones(len(asked), 1, dtype=torch.float64)], dim=1)
    return torch.tensor([1 / (1 + math.exp(-float(row @ weight))) for row in rows], dtype=torch.float64)


def effectiveness(before: list[bool], after: list[bool], gibberish: list[bool]) -> float:
    """E, an answer after the other: only one that is harmless and language has been made harmless."""
    harmful = sum(before) / len(before)
    failed = sum(1 for bad, noise in zip(after, gibberish, strict=True) if bad or noise) / len(after)
    return (harmful - failed) / harmful
