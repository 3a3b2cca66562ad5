"""Generation, a prompt at a time, without a cache, from the definition."""

from typing import Any

import torch


@torch.no_grad()
def answer(
    model: Any,
    prompt: list[int],
    tokens: int,
    end: int,
    numbers: list[float] | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[int]:
    """Tokens behind the prompt: the likeliest, or by inverse transform from `numbers`, one in [0, 1) a token."""
    said: list[int] = []
    for step in range(tokens):
        logits = model(input_ids=torch.tensor([prompt + said]), use_cache=False).logits[0, -1].double()
        if numbers is None:
            chosen = int(logits.argmax())
        else:
            chosen = _drawn((logits / temperature).softmax(0).tolist(), numbers[step], top_p)
        if chosen == end:
            break
        said.append(chosen)
    return said


def _drawn(probability: list[float], number: float, top_p: float) -> int:
    kept, mass = [], 0.0
    for token in sorted(range(len(probability)), key=lambda token: -probability[token]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probability[token]
    reached = 0.0
    for token in kept:
        reached += probability[token]
        if reached > number * mass:
            return token
    return kept[-1]
