"""Causal attention for the walker on a CPU: blocks of queries, explicit products.

torch's fused kernel gains nothing from bfloat16 on a CPU without AMX, and transformers repeats every key and value
head for it. Here the queries that share a key head go into one product, keys behind the block of queries are never
touched, and scores are bfloat16 as in transformers' own eager attention: less than half of the fused kernel's time.
Whatever is not plain causal attention in bfloat16 on a CPU goes to transformers' fused path unchanged.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "pareline"
QUERIES = 64  # a block: the scores stay in the cache, and little beyond the diagonal is computed in vain


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' interface has it: query [N, H, T, d], key and value [N, K, T, d] -> [N, T, H, d]."""
    causal = options.get("is_causal")
    plain = (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and attention_mask is None
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and query.shape[2] == key.shape[2]
        and not dropout
        and options.get("position_bias") is None
        and not torch.is_grad_enabled()
    )
    if not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    return causal_attention(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * Q K^T, of the tokens up to one's own) V, in blocks of queries.

    Args:
        query: [N, H, T, d]; key, value: [N, K, T, d] and [N, K, T, v], K dividing H.
        scaling: of the scores.

    Returns:
        [N, T, H, v] in the type of the query. Sums over keys are float32 inside the products and the softmax.
    """
    batch, heads, length, width = query.shape
    kinds = key.shape[1]
    group = heads // kinds
    keys = key.reshape(batch * kinds, length, width).transpose(1, 2)
    values = value.reshape(batch * kinds, length, -1)
    queries = (query * scaling).view(batch, kinds, group, length, width)
    out = query.new_empty(batch, length, kinds, group, values.shape[-1])
    future = query.new_full((QUERIES, QUERIES), -torch.inf).triu(1)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        rows = end - start
        block = queries[:, :, :, start:end].reshape(batch * kinds, group * rows, width)
        scores = torch.bmm(block, keys[:, :, :end])
        scores.view(batch * kinds, group, rows, end)[..., start:] += future[:rows, :rows]
        found = torch.bmm(scores.softmax(-1), values[:, :end])
        out[:, start:end] = found.view(batch, kinds, group, rows, -1).permute(0, 3, 1, 2, 4)
    return out.view(batch, length, heads, -1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
