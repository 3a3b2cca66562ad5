"""The walker's attention agrees with its naive twin, and keeps out of what it is not made for."""

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import eager_attention_forward

from compression.core import attention
from tests.reference import attention as reference


def example(heads: int, kinds: int, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value in the layout in which transformers hands them over: transposed views."""
    draw = torch.Generator().manual_seed(1)
    shapes = [(2, length, heads, 8), (2, length, kinds, 8), (2, length, kinds, 8)]
    query, key, value = (torch.randn(shape, generator=draw).to(dtype).transpose(1, 2) for shape in shapes)
    return query, key, value


@pytest.mark.parametrize(("heads", "kinds"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 5, 16, 37])
def test_equals_naive_twin(heads: int, kinds: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "QUERIES", 16)
    given = example(heads, kinds, length, torch.float32)
    found = attention.causal_attention(*given, 0.3)
    torch.testing.assert_close(found.double(), reference.causal_attention(*given, 0.3), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_good_as_transformers_eager_attention() -> None:
    given = example(6, 2, 100, torch.bfloat16)
    exact = attention.causal_attention(*(tensor.double() for tensor in given), 0.35)
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    future = torch.full((100, 100), -torch.inf).triu(1)[None, None].bfloat16()
    with torch.no_grad():
        found, _ = attention.attention(module, *given, None, scaling=0.35)
        usual, _ = eager_attention_forward(module, *given, future, scaling=0.35)
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().mean() < 1.1 * (usual - exact).abs().mean()


def test_leaves_the_rest_to_transformers() -> None:
    """A mask, float32, or an attention that sees the future: the very same result as transformers' own."""
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    window = torch.ones(40, 40).tril().triu(-4).bool()[None, None]
    half, full = example(6, 2, 40, torch.bfloat16), example(6, 2, 40, torch.float32)
    with torch.no_grad():
        for given, mask, causal in ((half, window, None), (full, None, None), (half, None, False)):
            found, _ = attention.attention(module, *given, mask, scaling=0.35, is_causal=causal)
            usual, _ = sdpa_attention_forward(module, *given, mask, scaling=0.35, is_causal=causal)
            assert torch.equal(found, usual)
