"""Causal attention on a CPU, forward and backward: blocks of queries, explicit products.

torch's fused kernel gains nothing from bfloat16 on a CPU without AMX, and transformers repeats every key and value
head for it. Here the queries that share a key head go into one product, keys behind the block of queries are never
touched, and scores are bfloat16 as in transformers' own eager attention: less than half of the fused kernel's time.
With AMX it is the other way round, and the forward pass is torch's own.
The backward pass computes the scores of a block anew, so nothing of the size of T x T is kept.
Whatever is not plain causal attention in bfloat16 on a CPU goes to transformers' fused path unchanged.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "pareline"
QUERIES = 64  # a block: the scores stay in the cache, and little beyond the diagonal is computed in vain
FUSED = torch.cpu._is_amx_tile_supported()  # torch's kernel takes half of the time then, and keeps float32 scores


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
    )
    if not plain:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = _CausalAttention.apply(query, key, value, scaling)
    return out, None


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        out = causal_attention(query, key, value, scaling)
        ctx.save_for_backward(query, key, value)
        ctx.scaling = scaling
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value = ctx.saved_tensors
        return *causal_attention_gradients(query, key, value, grad, ctx.scaling), None


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * Q K^T, of the tokens up to one's own) V.

    Args:
        query: [N, H, T, d]; key, value: [N, K, T, d] and [N, K, T, v], K dividing H.
        scaling: of the scores.

    Returns:
        [N, T, H, v] in the type of the query. Sums over keys are float32 inside the products and the softmax.
    """
    if FUSED and query.dtype == torch.bfloat16:
        fused = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return fused.transpose(1, 2).contiguous()
    batch, heads, length, _ = query.shape
    keys, values, queries = _folded(query, key, value, scaling)
    kinds, group = queries.shape[1:3]
    out = query.new_empty(batch, length, kinds, group, values.shape[-1])
    for start, end, _, weights in _blocks(queries, keys):
        found = torch.bmm(weights, values[:, :end])
        out[:, start:end] = found.view(batch, kinds, group, end - start, -1).permute(0, 3, 1, 2, 4)
    return out.view(batch, length, heads, -1)


def causal_attention_gradients(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `causal_attention` with respect to query, key and value.

    With P the softmax of the scores S and O = P V: dV = P^T dO, dP = dO V^T, dS = P o (dP - row sums of dP o P),
    dQ = dS K and dK = dS^T Q, both times the scaling. What is summed over blocks of queries is summed in float32.

    Args:
        grad: dO [N, T, H, v].
    """
    batch, _, length, width = query.shape
    keys, values, queries = _folded(query, key, value, scaling)
    kinds, group = queries.shape[1:3]
    grads = grad.reshape(batch, length, kinds, group, -1)
    d_query = torch.empty_like(queries)
    d_key = query.new_zeros(batch * kinds, length, width, dtype=torch.float32)
    d_value = query.new_zeros(values.shape, dtype=torch.float32)
    for start, end, block, weights in _blocks(queries, keys):
        d_out = grads[:, start:end].permute(0, 2, 3, 1, 4).reshape(batch * kinds, group * (end - start), -1)
        d_value[:, :end] += torch.bmm(weights.transpose(1, 2), d_out)
        d_weights = torch.bmm(d_out, values[:, :end].transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_query[:, :, :, start:end] = torch.bmm(d_scores, keys[:, :, :end].transpose(1, 2)).view(
            batch, kinds, group, end - start, width
        )
        d_key[:, :end] += torch.bmm(d_scores.transpose(1, 2), block)
    return (
        d_query.mul_(scaling).view(query.shape),
        d_key.to(key.dtype).view(key.shape),
        d_value.to(value.dtype).view(value.shape),
    )


def _folded(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [N K, d, T], values [N K, T, v] and scaled queries [N, K, H / K, T, d]: products of all heads at once."""
    batch, heads, length, width = query.shape
    kinds = key.shape[1]
    keys = key.reshape(batch * kinds, length, width).transpose(1, 2)
    values = value.reshape(batch * kinds, length, -1)
    return keys, values, (query * scaling).view(batch, kinds, heads // kinds, length, width)


def _blocks(queries: Tensor, keys: Tensor) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """By block of queries: its first token, the one behind its last, its queries [N K, n, d], P [N K, n, end]."""
    batch, kinds, group, length, width = queries.shape
    future = queries.new_full((QUERIES, QUERIES), -torch.inf).triu(1)
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        rows = end - start
        block = queries[:, :, :, start:end].reshape(batch * kinds, group * rows, width)
        scores = torch.bmm(block, keys[:, :, :end])
        scores.view(batch * kinds, group, rows, end)[..., start:] += future[:rows, :rows]
        yield start, end, block, scores.softmax(-1)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
