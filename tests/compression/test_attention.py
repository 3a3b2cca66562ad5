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


@pytest.mark.parametrize(("heads", "kinds"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [1, 16, 37])
def test_gradients_equal_autograd_through_the_twin(
    heads: int, kinds: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERIES", 16)
    given = [tensor.double().requires_grad_() for tensor in example(heads, kinds, length, torch.float32)]
    out = torch.randn(2, length, heads, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    query, key, value = given
    share = heads // kinds
    scores = 0.3 * query @ key.repeat_interleave(share, 1).transpose(2, 3)
    scores = scores + torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    twin = (scores.softmax(-1) @ value.repeat_interleave(share, 1)).transpose(1, 2)
    expected = torch.autograd.grad((twin * out).sum(), given)
    plain = [tensor.detach() for tensor in given]
    found = attention.causal_attention_gradients(plain[0], plain[1], plain[2], out, 0.3)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)  # sums over blocks are float32


def test_bfloat16_gradients_are_as_good_as_transformers_eager_attention() -> None:
    exact = [tensor.double().requires_grad_() for tensor in example(6, 2, 100, torch.bfloat16)]
    future = torch.full((100, 100), -torch.inf).triu(1)[None, None]
    module = nn.Module()
    module.num_key_value_groups = 3  # type: ignore[assignment]
    given = [[t.detach().bfloat16().requires_grad_() for t in exact] for _ in range(2)]
    eager_attention_forward(module, *exact, future.double(), scaling=0.35)[0].square().sum().backward()
    eager_attention_forward(module, *given[0], future.bfloat16(), scaling=0.35)[0].square().sum().backward()
    attention.attention(module, *given[1], None, scaling=0.35)[0].square().sum().backward()
    for true, usual, own in zip(exact, *given, strict=True):
        assert (own.grad - true.grad).abs().mean() < 1.1 * (usual.grad - true.grad).abs().mean()


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
