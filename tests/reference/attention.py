"""Causal attention, a query at a time."""

import math

import torch
from torch import Tensor


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """query [N, H, T, d], key and value [N, K, T, d] -> float64 [N, T, H, d]; H / K queries share a key head."""
    batch, heads, length = query.shape[:3]
    share = heads // key.shape[1]
    out = torch.zeros(batch, length, heads, value.shape[-1], dtype=torch.float64)
    for n in range(batch):
        for head in range(heads):
            keys, values = key[n, head // share].double(), value[n, head // share].double()
            for place in range(length):
                scores = [scaling * float(query[n, head, place].double() @ keys[past]) for past in range(place + 1)]
                weights = [math.exp(score - max(scores)) for score in scores]
                for past, weight in enumerate(weights):
                    out[n, place, head] += weight / sum(weights) * values[past]
    return out
