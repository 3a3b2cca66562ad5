"""RMS norms in rows: the bytes of the plain ones, and gradients where they are wanted."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compression.core.norms import ENTRIES, by_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 576])
def test_a_norm_in_rows_gives_the_bytes_of_the_plain_one(dtype: torch.dtype, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    plain, rows = (LlamaRMSNorm(width).to(dtype) for _ in range(2))
    plain.weight.data = rows.weight.data = torch.randn(width, generator=g).to(dtype)
    by_rows(rows)
    tokens = 2 * ENTRIES // width + 3  # the last rows are fewer
    hidden = torch.randn(3, tokens, width, generator=g).to(dtype).transpose(0, 1)  # not contiguous
    with torch.no_grad():
        assert torch.equal(rows(hidden), plain(hidden))


def test_gradients_go_through_a_norm_in_rows() -> None:
    plain, rows = LlamaRMSNorm(16), LlamaRMSNorm(16)
    by_rows(rows)
    found = []
    for norm in (plain, rows):
        hidden = torch.linspace(-1, 1, ENTRIES + 16).view(-1, 16).requires_grad_()
        norm(hidden).square().sum().backward()
        found.append((hidden.grad, norm.weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
