"""What a model knows by heart, against one token at a time and by hand."""

import math

import pytest
import torch
from torch import Tensor

from compression.core import batches
from compression.evaluation import loss
from compression.evaluation.loss import TokenFigures, divergence, last_states, token_figures
from compression.evaluation.memorisation import answer_mean, memorisation, sample_figures
from compression.training.samples import Samples, padded, whole_text
from tests import tiny
from tests.compression.helpers import make_skeleton, whole_model
from tests.conftest import Make
from tests.reference import forgetting as reference


def figures(rows: list[list[bool]], losses: list[list[float]] | None = None) -> TokenFigures:
    greedy = torch.tensor(rows)
    found = torch.tensor(losses) if losses else torch.ones(greedy.shape)
    return TokenFigures(found, greedy, torch.zeros(greedy.shape))


def measured(family: str, imported: Make, ids: Tensor) -> TokenFigures:
    skeleton = make_skeleton(imported(family))
    return token_figures(skeleton, last_states(skeleton, {"text": ids})["text"])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_equal_one_at_a_time(family: str, imported: Make, ids: Tensor) -> None:
    short = ids[:2, :9]
    found = measured(family, imported, short)
    model = whole_model(imported(family))
    for row, tokens in enumerate(short.tolist()):
        for place, log_p in enumerate(reference.log_probabilities(model, tokens)):
            token = tokens[place + 1]
            assert float(found.loss[row, place]) == pytest.approx(-log_p[token], abs=1e-4)
            assert bool(found.greedy[row, place]) == (max(log_p) == log_p[token])
            assert float(found.standardised[row, place]) == pytest.approx(
                reference.standardised(log_p, token), rel=1e-3, abs=1e-3
            )


def test_divergence_equals_a_direct_sum(imported: Make, ids: Tensor, pruned: object) -> None:
    short = ids[:2, :12]
    folders = [imported("llama"), pruned.folder]  # type: ignore[attr-defined]
    skeletons = [make_skeleton(folder) for folder in folders]
    states = [last_states(skeleton, {"text": short})["text"] for skeleton in skeletons]
    found = divergence(skeletons[0], states[0], skeletons[1], states[1])
    models = [whole_model(folder) for folder in folders]
    for row, tokens in enumerate(short.tolist()):
        pairs = zip(*(reference.log_probabilities(model, tokens) for model in models), strict=True)
        direct = [reference.divergence(p, q) for p, q in pairs]
        assert found[row].tolist() == pytest.approx(direct, rel=1e-3, abs=1e-5)
    assert float(found.min()) >= 0
    assert float(found.mean()) > 0.01
    same = divergence(skeletons[0], states[0], skeletons[0], states[0])
    assert float(same.abs().max()) == 0


@pytest.mark.parametrize("tokens", [1, 70, 100_000])
def test_batches_do_not_matter(tokens: int, imported: Make, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measured("llama", imported, ids)
    monkeypatch.setattr(batches, "CPU_TOKENS", tokens)
    monkeypatch.setattr(loss, "HEAD_TOKENS", tokens)
    monkeypatch.setattr(loss, "DISTRIBUTIONS", max(tokens // 10, 1))
    found = measured("llama", imported, ids)
    assert found.greedy.equal(expected.greedy)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.standardised, expected.standardised, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("greedy", "exact", "strength"),
    [
        ([True] * 4, 1.0, 1.0),  # known from its first token on
        ([False] * 4, 0.0, 0.0),
        ([False, False, True, True], 0.5, 0.5),  # from the middle on
        ([True, True, True, False], 0.75, 0.0),  # the end has to be told, too
        ([True, False, True, True], 0.75, 0.5),
    ],
)
def test_exact_memorisation_and_extraction_strength_by_hand(greedy: list[bool], exact: float, strength: float) -> None:
    found = sample_figures(figures([greedy]), whole_text(torch.zeros(1, 5, dtype=torch.int64)))
    assert float(found["exact_memorisation"]) == exact
    assert float(found["extraction_strength"]) == strength == reference.extraction_strength(greedy)


def test_extraction_strength_equals_every_prefix_tried() -> None:
    rows = (torch.rand(40, 9, generator=torch.Generator().manual_seed(0)) < 0.8).tolist()
    found = sample_figures(figures(rows), whole_text(torch.zeros(40, 10, dtype=torch.int64)))
    assert found["extraction_strength"].tolist() == pytest.approx([reference.extraction_strength(row) for row in rows])


def test_probability_is_the_geometric_mean() -> None:
    losses = [[math.log(2), math.log(8)]]
    found = sample_figures(figures([[True, True]], losses), whole_text(torch.zeros(1, 3, dtype=torch.int64)))
    assert float(found["loss"]) == pytest.approx(math.log(4))
    assert float(found["probability"]) == pytest.approx(0.25)


def test_prompts_and_what_fills_a_row_up_count_nothing() -> None:
    samples = padded([[5, 6], [7]], [[1, 2, 3], [4, 4]], length=7, filler=0)
    right = [[False, True, True, False, True, True], [True, True, False, False, False, False]]
    losses = [[90.0, 1, 2, 3, 90, 90], [4.0, 6, 90, 90, 90, 90]]
    found = sample_figures(figures(right, losses), samples)
    assert found["loss"].tolist() == [2.0, 5.0]
    assert found["exact_memorisation"].tolist() == pytest.approx([2 / 3, 1.0])
    assert found["extraction_strength"].tolist() == [0.0, 1.0]
    assert answer_mean(torch.tensor(losses), samples) == pytest.approx((1 + 2 + 3 + 4 + 6) / 5)  # over tokens


def test_a_filled_up_row_is_worth_what_it_is_alone(imported: Make, ids: Tensor) -> None:
    tokens = ids[0].tolist()
    wide = padded([tokens[:8], tokens[:4]], [tokens[8:30], tokens[4:40]], length=48, filler=9)
    together = memorisation(make_skeleton(imported("llama")), {"both": wide})["both"]
    alone = [
        memorisation(make_skeleton(imported("llama")), {"one": whole_text(torch.tensor([tokens[:end]]), prompt)})["one"]
        for prompt, end in ((8, 30), (4, 40))
    ]
    for key, value in together.items():
        assert value == pytest.approx(sum(one[key] for one in alone) / 2, abs=1e-5), key


def test_a_model_knows_more_of_what_it_has_learned(imported: Make) -> None:
    texts = {
        "learned": whole_text(tiny.encode(tiny.sentences(1, 20)), 16),
        "new": whole_text(
            tiny.encode("quartz jigs vex my bold lynx; pack five dozen jugs, he wrote, not once but twice. "), 16
        ),
    }
    found = memorisation(make_skeleton(imported("llama")), texts)
    assert found["learned"]["exact_memorisation"] > found["new"]["exact_memorisation"] + 0.2
    assert found["learned"]["probability"] > 2 * found["new"]["probability"]


def test_rows_can_be_taken_apart(imported: Make, ids: Tensor) -> None:
    """A sample's figures are its own."""
    samples = whole_text(ids[:3], 8)
    skeleton = make_skeleton(imported("llama"))
    together = sample_figures(measured("llama", imported, ids[:3]), samples)
    one = memorisation(skeleton, {"second": Samples(ids[1:2], samples.answer[1:2])})["second"]
    for key, value in one.items():
        assert float(together[key][1]) == pytest.approx(value, abs=1e-5)
