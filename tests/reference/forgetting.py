"""Figures of forgetting from plain lists, a token, a pair or a subsequence at a time."""

import math
from itertools import combinations

import torch
from torch import Tensor, nn


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: list[int]) -> list[list[float]]:
    """log p of every token of the vocabulary at each place but the first, the whole model run on what is before."""
    rows = []
    for place in range(1, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1].double().tolist()
        top = max(logits)
        total = top + math.log(sum(math.exp(logit - top) for logit in logits))
        rows.append([logit - total for logit in logits])
    return rows


def standardised(log_p: list[float], token: int) -> float:
    mean = sum(math.exp(one) * one for one in log_p)
    variance = sum(math.exp(one) * (one - mean) ** 2 for one in log_p)
    return (log_p[token] - mean) / math.sqrt(variance)


def divergence(first: list[float], second: list[float]) -> float:
    return sum(math.exp(p) * (p - q) for p, q in zip(first, second, strict=True))


def extraction_strength(greedy: list[bool]) -> float:
    """Tries every prefix, the shortest first."""
    length = len(greedy)
    return 1 - next(prefix for prefix in range(length + 1) if all(greedy[prefix:])) / length


def lowest_mean(values: list[float], percent: int) -> float:
    taken = sorted(values)[: max(1, len(values) * percent // 100)]
    return sum(taken) / len(taken)


def auc(seen: Tensor, unseen: Tensor) -> float:
    pairs = [(one, other) for one in seen.tolist() for other in unseen.tolist()]
    return sum(1.0 if one > other else 0.5 if one == other else 0.0 for one, other in pairs) / len(pairs)


def longest_common_subsequence(first: list[str], second: list[str]) -> int:
    """Every subsequence of the first, the longest first."""
    for length in range(len(first), 0, -1):
        for words in combinations(first, length):
            rest = iter(second)
            if all(word in rest for word in words):
                return length
    return 0
