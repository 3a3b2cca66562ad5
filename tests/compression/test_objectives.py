"""Every unlearning objective against its naive twin, on a model in the middle of its training."""

import copy
import random
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from compression.training.masked_linear import MaskedLinear, at_start, attach
from compression.training.samples import Samples, padded, whole_text
from compression.unlearning import METHODS
from compression.unlearning.answers import answered_anew, answers_of
from compression.unlearning.draw import Draw, Learner
from compression.unlearning.likelihood import (
    divergences,
    lengths,
    mean_loss,
    mean_of_rows,
    predictions,
    sequence_losses,
    token_losses,
)
from tests import tiny
from tests.reference import unlearning as reference

OBJECTIVES = [name for name in METHODS if name != "none"]
WORDS = 11  # of the vocabulary
ANSWERS = [[1, 2], [3, 4, 5, 6], [7]]
OPTIONS = {
    "forget_weight": 0.7, "retain_weight": 1.3, "random_weight": 0.6, "beta": 0.5, "delta": 0.2, "block": 1,
    "steering": 3.0, "seed": 3,
}  # fmt: skip
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


class Trained(NamedTuple):
    """A model in float64 whose adapters have moved, and a copy of what it started as."""

    model: nn.Module
    start: nn.Module
    layers: dict[str, MaskedLinear]
    learner: Learner


@pytest.fixture
def trained() -> Trained:
    architecture, config = tiny.FAMILIES["llama"]
    small = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24}
    model = tiny.build(architecture, config | small).double().eval().requires_grad_(False)
    start = copy.deepcopy(model)
    shapes = {name: module.weight.shape for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    keep = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items() if name != "lm_head"}
    layers = attach(model, keep, 2, 2.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        layer.A.data = layer.A.data.double()
        layer.B.data = 0.3 * torch.randn(layer.B.shape, generator=generator, dtype=torch.float64)
    return Trained(model, start, layers, Learner(model, partial(at_start, layers.values())))


def pairs(seed: int, count: int, length: int, empty: bool = False) -> Samples:
    """Random prompts and answers, some cut off at the end; the last one without an answer if asked for."""
    draw = random.Random(seed)
    prompts, answers = (
        [[draw.randrange(WORDS) for _ in range(draw.randint(1, 5))] for _ in range(count)] for _ in range(2)
    )
    if empty:
        answers[-1] = []
    return padded(prompts, answers, length, filler=0)


def draw_of(trained: Trained, forget: Samples, retain: Samples) -> Draw:
    return Draw(forget, retain, trained.learner, ANSWERS, ANSWERS, torch.Generator().manual_seed(5))


def case_of(name: str, trained: Trained, forget: Samples, retain: Samples) -> reference.Case:
    def logits(model: nn.Module) -> Callable[[list[int]], Tensor]:
        return lambda tokens: model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]

    def states(model: nn.Module) -> Callable[[list[int]], Tensor]:
        behind = OPTIONS["block"] + 1  # the first of them is what enters block 0
        return lambda tokens: model(
            input_ids=torch.tensor([tokens]), use_cache=False, output_hidden_states=True
        ).hidden_states[behind][0]  # type: ignore[index]

    length = forget.ids.shape[1] if name == "llmu" else None  # its random answers are no longer than the answers
    anew = answered_anew(forget, ANSWERS, torch.Generator().manual_seed(5), length)
    models = trained.model, trained.start
    return reference.Case(
        *(reference.rows(samples) for samples in (forget, retain, anew)), *map(logits, models), *map(states, models)
    )


def loss_of(name: str, draw: Draw) -> tuple[Tensor, dict[str, float]]:
    value: tuple[Tensor, dict[str, float]] = import_module(METHODS[name]).loss(draw, OPTIONS)
    return value


def gradients(trained: Trained, loss: Tensor) -> list[Tensor]:
    adapters = [adapter for layer in trained.layers.values() for adapter in (layer.A, layer.B)]
    found = torch.autograd.grad(loss, adapters, allow_unused=True)
    return [torch.zeros_like(own) if grad is None else grad for own, grad in zip(adapters, found, strict=True)]


@every_objective
@pytest.mark.parametrize(("seed", "empty"), [(1, False), (2, False), (3, True)])
def test_loss_and_gradient_equal_the_twin(trained: Trained, name: str, seed: int, empty: bool) -> None:
    forget, retain = pairs(seed, 3, 7, empty), pairs(seed + 10, 2, 9)
    value, _ = loss_of(name, draw_of(trained, forget, retain))
    twin = reference.LOSSES[name](case_of(name, trained, forget, retain), OPTIONS)
    assert value.item() == pytest.approx(twin.item(), rel=1e-5)
    for own, other in zip(gradients(trained, value), gradients(trained, twin), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)


@every_objective
def test_plain_text_has_a_prompt_of_its_first_tokens(trained: Trained, name: str) -> None:
    ids = torch.randint(WORDS, (4, 8), generator=torch.Generator().manual_seed(2))
    forget, retain = whole_text(ids[:2], 3), whole_text(ids[2:], 3)
    value, _ = loss_of(name, draw_of(trained, forget, retain))
    assert value.item() == pytest.approx(
        reference.LOSSES[name](case_of(name, trained, forget, retain), OPTIONS).item(), rel=1e-5
    )


@every_objective
def test_what_fills_a_row_up_changes_nothing(trained: Trained, name: str) -> None:
    """Other tokens there, and more of them: the same loss, the same gradient."""
    forget, retain = pairs(1, 3, 12), pairs(2, 3, 12)

    def refilled(samples: Samples, token: int, more: int) -> Samples:
        behind = torch.arange(samples.ids.shape[1]) > samples.answer.int().cumsum(1).argmax(1)[:, None]
        ids = nn.functional.pad(torch.where(behind, token, samples.ids), (0, more), value=token)
        return Samples(ids, nn.functional.pad(samples.answer, (0, more)))

    before, _ = loss_of(name, draw_of(trained, forget, retain))
    after, _ = loss_of(name, draw_of(trained, refilled(forget, 9, 0), refilled(retain, 8, 4)))
    assert after.item() == pytest.approx(before.item(), rel=1e-6)
    for own, other in zip(gradients(trained, after), gradients(trained, before), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gradient_ascent", "grad_diff", "llmu", "npo", "simnpo", "dpo", "undial"])
def test_the_losses_of_both_texts_are_told(trained: Trained, name: str) -> None:
    forget, retain = pairs(1, 3, 7), pairs(2, 2, 9)
    case = case_of(name, trained, forget, retain)
    _, figures = loss_of(name, draw_of(trained, forget, retain))
    by_token = reference.nll(case.forget, case.model), reference.nll_by_row(case.forget, case.model)
    assert figures["forget"] == pytest.approx(by_token[name == "llmu"].item(), rel=1e-5)
    if "retain" in figures:
        assert figures["retain"] == pytest.approx(reference.nll(case.retain, case.model).item(), rel=1e-5)


def test_the_start_model_is_there_without_a_copy(trained: Trained) -> None:
    """After training has moved the adapters it answers as the model did before they were put in, to the bit."""
    samples = pairs(1, 3, 7)
    (before,) = trained.learner.start_logits(samples)
    (now,) = trained.learner.logits(samples)
    with torch.no_grad():
        alone = trained.start(input_ids=samples.ids).logits
    assert torch.equal(before, alone)
    assert not before.requires_grad
    assert now.requires_grad
    assert (now - alone).abs().max() > 0.1
    assert not any(layer.as_at_start for layer in trained.layers.values())


def test_the_start_model_is_left_when_it_fails(trained: Trained) -> None:
    with pytest.raises(IndexError):
        trained.learner.start_logits(Samples(torch.tensor([[WORDS]]), torch.tensor([[False]])))
    assert not any(layer.as_at_start for layer in trained.layers.values())


def test_states_stop_behind_their_block(trained: Trained) -> None:
    samples = pairs(1, 3, 7)
    states = trained.learner.states(0, samples)[0]
    wanted = trained.model(input_ids=samples.ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(states, wanted)
    value, _ = import_module(METHODS["rmu"]).loss(draw_of(trained, samples, samples), OPTIONS | {"block": 0})
    moved = {
        name for name, layer in trained.layers.items() if torch.autograd.grad(
            value, layer.A, retain_graph=True, allow_unused=True
        )[0] is not None
    }  # fmt: skip
    assert moved == {name for name in trained.layers if ".layers.0." in name}


# Answer masks, by hand: a vocabulary of three, of which the model gives the first half, the others a quarter.

HALF = torch.tensor([0.5, 0.25, 0.25]).log()
SAMPLES = padded([[2], [1, 1], [0, 2]], [[0, 1, 0], [2], []], length=4, filler=1)
#   2 | 0 1 0      1 1 | 2 .      0 2 . .


def test_only_answers_are_counted() -> None:
    logits = HALF.expand(3, 4, 3)
    losses = token_losses(logits, SAMPLES)
    two, four = torch.tensor([2.0, 4.0]).log()
    torch.testing.assert_close(losses, torch.stack([two, four, two, four]))
    torch.testing.assert_close(sequence_losses(losses, SAMPLES), torch.stack([2 * two + four, four, 0 * two]))
    assert lengths(SAMPLES).tolist() == [3, 1, 1]
    torch.testing.assert_close(mean_loss(losses), (2 * two + 2 * four) / 4)
    torch.testing.assert_close(mean_of_rows(losses, SAMPLES), ((2 * two + four) / 3 + four) / 2)


def test_logits_that_predict_no_answer_have_no_gradient() -> None:
    logits = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    token_losses(logits, SAMPLES).sum().backward()
    assert logits.grad is not None
    met = logits.grad.abs().sum(2) > 0
    assert met.tolist() == [[True, True, True, False], [False, True, False, False], [False] * 4]


def test_rows_without_answers_cost_nothing() -> None:
    none = Samples(SAMPLES.ids[2:], SAMPLES.answer[2:])
    logits = torch.zeros(1, 4, 3, requires_grad=True)
    losses = token_losses(logits, none)
    value = mean_loss(losses) + mean_of_rows(losses, none)
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_losses_are_float32_whatever_the_logits_are() -> None:
    logits = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert predictions(logits, SAMPLES).dtype == token_losses(logits, SAMPLES).dtype == torch.float32
    torch.testing.assert_close(token_losses(logits, SAMPLES), token_losses(logits.float(), SAMPLES))


def test_divergence_is_the_direct_sum() -> None:
    start, logits = torch.randn(2, 3, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    p0, p = start.softmax(2), logits.softmax(2)
    direct = (p0 * (p0 / p).log()).sum(2)
    wanted = torch.stack([direct[0, 0], direct[0, 1], direct[0, 2], direct[1, 1]])
    torch.testing.assert_close(divergences(start, logits, SAMPLES).double(), wanted, rtol=1e-5, atol=1e-6)
    assert divergences(start, start, SAMPLES).abs().max() == 0


# Other answers.


def test_answers_are_those_of_the_rows_that_have_one() -> None:
    assert answers_of(SAMPLES) == [[0, 1, 0], [2]]


def test_other_answers_stand_behind_the_same_prompts() -> None:
    anew = answered_anew(SAMPLES, [[5, 6, 7, 8, 9]], torch.Generator(), length=4)
    assert anew.ids.tolist() == [[2, 5, 6, 7], [1, 1, 5, 6], [0, 0, 0, 0]]
    assert anew.answer.tolist() == [[False, True, True, True], [False, False, True, True], [False] * 4]


def test_other_answers_are_whole_unless_they_are_cut() -> None:
    anew = answered_anew(SAMPLES, [[5, 6, 7, 8, 9]], torch.Generator())
    assert anew.ids.tolist() == [[2, 5, 6, 7, 8, 9, 0], [1, 1, 5, 6, 7, 8, 9], [0, 0, 0, 0, 0, 0, 0]]
    assert anew.answer.sum(1).tolist() == [5, 5, 0]


def test_trimmed_rows_lose_nothing_that_counts() -> None:
    long = Samples(nn.functional.pad(SAMPLES.ids, (0, 5)), nn.functional.pad(SAMPLES.answer, (0, 5)))
    kept = int(SAMPLES.answer.any(0).nonzero().max()) + 1
    assert torch.equal(long.trimmed().ids, SAMPLES.ids[:, :kept])
    assert torch.equal(long.trimmed().answer, SAMPLES.answer[:, :kept])


def test_other_answers_are_drawn_from_all() -> None:
    samples = padded([[3]] * 200, [[4]] * 200, 2, filler=0)
    drawn = answered_anew(samples, [[5], [6], [7]], torch.Generator().manual_seed(0)).ids[:, 1]
    counts = [int((drawn == token).sum()) for token in (5, 6, 7)]
    assert sum(counts) == 200
    assert min(counts) > 40
    again = answered_anew(samples, [[5], [6], [7]], torch.Generator().manual_seed(0)).ids[:, 1]
    assert torch.equal(drawn, again)


def settings(name: str) -> dict[str, Any]:
    found: dict[str, Any] = import_module(METHODS[name]).SETTINGS
    return found


def test_papers_settings_are_told() -> None:
    """What a check shows to whoever leaves one out."""
    told = {name: settings(name) for name in OBJECTIVES}
    assert told["npo"] == {"beta": 0.1}
    assert told["simnpo"] == {"beta": 4.5, "delta": 0.0}
    assert told["undial"] == {"beta": 10.0}
    assert told["llmu"] == {"random_weight": 1.0}
    assert set(told["rmu"]) == {"block", "steering"}
    assert set(told["dpo"]) == {"beta", "refusals"}
    assert told["grad_diff"] == told["gradient_ascent"] == {}
