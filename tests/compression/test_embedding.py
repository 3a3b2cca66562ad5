"""Embeddings are those of the padded model, whatever goes with them; fidelity and the head are what they say."""

import random

import pytest
import torch
from torch import Tensor

from compression.core import batches
from compression.evaluation.embedding import embed
from compression.evaluation.fidelity import fidelity
from compression.evaluation.logistic import train_head
from tests.compression.helpers import make_skeleton, whole_model
from tests.conftest import Make
from tests.reference import embedding as reference


@pytest.fixture(scope="module")
def sentences(ids: Tensor) -> list[Tensor]:
    """Of many lengths, some of them alike, in no order."""
    draw = random.Random(0)
    return [row[: draw.choice([3, 7, 7, 20, 41])] for row in torch.cat([ids, ids.roll(5, 1)])]


def vectors(count: int, width: int, seed: int) -> Tensor:
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(drawn, dim=1)


def test_padding_changes_nothing(imported: Make, sentences: list[Tensor]) -> None:
    found = embed(make_skeleton(imported("bert")), sentences)
    expected = reference.embeddings(whole_model(imported("bert")), sentences)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    assert len({len(sentence) for sentence in sentences}) > 2
    assert (found @ found.T).fill_diagonal_(0).max() < 0.999  # they can be told apart


@pytest.mark.parametrize("tokens", [1, 50])
def test_company_changes_nothing(
    tokens: int, imported: Make, sentences: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = embed(make_skeleton(imported("bert")), sentences)
    alone = [embed(make_skeleton(imported("bert")), [sentence]) for sentence in sentences[:4]]
    torch.testing.assert_close(torch.cat(alone), together[:4], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(batches, "CPU_TOKENS", tokens)
    torch.testing.assert_close(embed(make_skeleton(imported("bert")), sentences), together, rtol=1e-4, atol=1e-5)


def test_fidelity_is_that_of_the_twin() -> None:
    dense = vectors(9, 5, seed=0)
    altered = torch.nn.functional.normalize(dense + 0.3 * vectors(9, 5, seed=1), dim=1)
    found = fidelity(altered, dense)
    assert found == pytest.approx(reference.fidelity(altered, dense), rel=1e-6)
    assert 0.5 < found.ranks < 0.999


def test_embeddings_that_turn_together_find_the_same_neighbours() -> None:
    dense = vectors(12, 6, seed=0)
    turned = fidelity(dense @ torch.linalg.qr(vectors(6, 6, seed=1))[0], dense)
    assert turned.ranks == pytest.approx(1, abs=1e-3)
    assert turned.cosine < 0.5
    assert fidelity(dense, dense) == pytest.approx((1, 1))


def test_head_is_that_of_gradient_descent() -> None:
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labels = (features @ torch.tensor([[1.0, 0, -1], [0, 2, 0], [-1, 0, 1]]) + 0.5).argmax(1)
    head = train_head(features, labels, 0.01)
    weight, bias = reference.head(features, labels.tolist(), 0.01)
    torch.testing.assert_close(head.weight, weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head.bias - head.bias.mean(), bias - bias.mean(), rtol=1e-4, atol=1e-4)
    again = train_head(features, labels, 0.01)
    assert torch.equal(again.weight, head.weight)
    right = [int(max(range(3), key=lambda c: float(weight[c] @ row.double() + bias[c]))) for row in features]
    assert head.accuracy(features, labels) == sum(r == y for r, y in zip(right, labels.tolist(), strict=True)) / 40


def test_head_without_a_hint_says_what_is_commonest() -> None:
    features, labels = torch.zeros(10, 4), torch.tensor([1] * 7 + [0] * 3)
    head = train_head(features, labels, 1.0)
    assert head.accuracy(features, labels) == 0.7
    assert head.logits(features[:1]).softmax(1)[0].tolist() == pytest.approx([0.3, 0.7], abs=1e-6)
