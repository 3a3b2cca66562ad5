"""Answers: the same whatever the batch, the same again, and what a loop without batches and caches says."""

import math
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from compression.core.checkpoint import Checkpoint
from compression.core.errors import Problem
from compression.evaluation.generation import generate, load_model
from tests import tiny
from tests.conftest import Make
from tests.reference.generation import answer

PROMPTS = ["the old", "a young sailor watched", "t", "Lily had a red ball. ", "Mom smiled and sa", "the harbour ma"]


def encoded(texts: list[str]) -> list[list[int]]:
    return [[tiny.LETTERS.index(letter) for letter in text] for text in texts]


@pytest.fixture(scope="module")
def model(imported: Make) -> Any:
    return load_model(imported("llama"))


@pytest.mark.parametrize("family", tiny.CAUSAL)
def test_the_likeliest_tokens_are_those_of_a_plain_loop_in_every_batch(family: str, imported: Make) -> None:
    model = load_model(imported(family))
    prompts = encoded(PROMPTS)
    wanted = [answer(model, prompt, 8, end=0) for prompt in prompts]
    assert generate(model, prompts, 8) == wanted
    assert generate(model, prompts[::-1], 8, sequences=4) == wanted[::-1]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9), (2.0, 0.3)])
def test_what_is_drawn_is_what_a_plain_loop_draws(model: Any, temperature: float, top_p: float) -> None:
    prompts = encoded(PROMPTS)
    draw = torch.Generator().manual_seed(5)
    numbers = torch.rand(len(prompts), 12, generator=draw, dtype=torch.float64).tolist()
    wanted = [
        answer(model, prompt, 12, 0, own, temperature, top_p) for prompt, own in zip(prompts, numbers, strict=True)
    ]
    for sequences in (1, 4, 16):
        assert generate(model, prompts, 12, 5, temperature, top_p, sequences) == wanted


def test_seeds_differ_and_equal_seeds_do_not(model: Any) -> None:
    prompts = encoded(PROMPTS)
    first = generate(model, prompts, 12, seed=0)
    assert first == generate(model, prompts, 12, seed=0)
    assert first != generate(model, prompts, 12, seed=1)
    assert generate(model, prompts, 12, seed=0, top_p=1e-9) == generate(model, prompts, 12)


def test_tokens_are_drawn_as_often_as_they_are_likely(model: Any) -> None:
    prompt = encoded(["the "])[0]
    with torch.no_grad():
        likely = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(0)
    drawn = generate(model, [prompt] * 2000, 1, seed=0, sequences=500)
    seen = torch.zeros(96).index_add(0, torch.tensor([own[0] if own else 0 for own in drawn]), torch.ones(2000)) / 2000
    assert (seen - likely).abs().max() < 4 * math.sqrt(0.25 / 2000)


def test_an_answer_ends_where_the_model_ends_it(model: Any) -> None:
    prompts = encoded(PROMPTS)
    whole = generate(model, prompts, 20)
    own = model.generation_config
    ends = sorted({answer[6] for answer in whole})
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    try:
        cut = generate(model, prompts, 20)
    finally:
        model.generation_config = own
    stops = [next(place for place, token in enumerate(answer) if token in ends) for answer in whole]
    assert cut == [answer[:stop] for answer, stop in zip(whole, stops, strict=True)]
    assert max(map(len, cut)) <= 6


def test_what_the_folder_asks_for_is_not_heeded(model: Any) -> None:
    prompts = encoded(PROMPTS)
    wanted, own = generate(model, prompts, 12), model.generation_config
    odd = GenerationConfig(eos_token_id=0, do_sample=True, temperature=5.0, repetition_penalty=9.0, min_new_tokens=12)
    model.generation_config = odd
    try:
        assert generate(model, prompts, 12) == wanted
        assert model.generation_config is odd
    finally:
        model.generation_config = own


def test_a_packed_checkpoint_answers(quantized: Checkpoint) -> None:
    prompts = encoded(PROMPTS)
    found = generate(quantized.folder, prompts, 8)
    assert found == generate(load_model(quantized.folder), prompts, 8, sequences=2)
    assert [len(answer) for answer in found] == [8] * len(prompts)


def test_no_prompts_no_answers(model: Any) -> None:
    assert generate(model, [], 8) == []


def test_prompts_that_will_not_do(model: Any) -> None:
    with pytest.raises(Problem, match="prompt 1: it has no tokens"):
        generate(model, [[5], []], 8)
    with pytest.raises(Problem, match=r"prompt 0: its 100 tokens and 29 .* 128 positions\n.*at most 28 tokens"):
        generate(model, [[5] * 100], 29)
    assert len(generate(model, [[5] * 100], 28)) == 1
