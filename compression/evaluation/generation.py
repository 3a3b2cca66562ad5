"""Answers of a model to prompts: the likeliest token each time, or drawn.

Prompts of a batch are filled up on the left and masked there, so that an answer is the same in any batch but for the
rounding of matrix products.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor

from compression.core.checkpoint import ADAPTER
from compression.core.errors import Problem
from compression.core.progress import progress

CPU = torch.device("cpu")


def load_model(folder: Path, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Any:
    """A checkpoint of any stage as transformers loads it, its adapter on it if it has one."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True, trust_remote_code=False)
    if (folder / ADAPTER).exists():
        model = PeftModel.from_pretrained(model, str(folder / ADAPTER), autocast_adapter_dtype=False)
    return model.to(device).eval()


@torch.no_grad()
def generate(
    model: Any,
    prompts: list[list[int]],
    tokens: int,
    seed: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    sequences: int = 16,
) -> list[list[int]]:
    """Goes on with each prompt.

    Args:
        model: a causal language model of transformers, or the folder of a checkpoint.
        prompts: token ids; none is empty.
        tokens: of an answer, at most.
        seed: of the draw; None: always the likeliest token, and the two below are not read.
        temperature: logits are divided by it.
        top_p: only the likeliest tokens are drawn from, as many as reach this probability together.
        sequences: prompts a batch; those of about the same length go together.

    Returns:
        the answers in the order of the prompts, each up to the end-of-sequence token and without it; maybe empty.

    Raises:
        Problem: a prompt is empty, or has no room for its answer in the model's context.
    """
    model = load_model(model) if isinstance(model, Path) else model
    _check(prompts, tokens, model.config.get_text_config())
    own = model.generation_config
    ends = [own.eos_token_id] if isinstance(own.eos_token_id, int) else own.eos_token_id or []
    filler = ends[0] if ends else 0
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    numbers = torch.rand(len(prompts), tokens, generator=draw, dtype=torch.float64)  # one each, whatever the batch
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    batches = [order[start : start + sequences] for start in range(0, len(order), sequences)]
    answers: list[list[int]] = [[] for _ in prompts]
    # A folder may ask for penalties or a temperature of its own: what is measured here is the model without them.
    model.generation_config = GenerationConfig(eos_token_id=ends or None, pad_token_id=filler)
    try:
        for rows in progress(batches, what="answers", unit="batch"):
            ids, mask = _left_padded([prompts[row] for row in rows], filler, model.device)
            choose = [] if seed is None else [_Draw(numbers[rows], ids.shape[1], temperature, top_p)]
            said = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, logits_processor=choose
            )
            for row, answer in zip(rows, said[:, ids.shape[1] :].tolist(), strict=True):
                stop = next((place for place, token in enumerate(answer) if token in ends), len(answer))
                answers[row] = answer[:stop]
    finally:
        model.generation_config = own
    return answers


class _Draw(LogitsProcessor):
    """Leaves one token: the first at which the probabilities, from the likeliest on, add up to more than a number.

    Args:
        numbers: float64 [n, tokens], uniform in [0, 1), one for each token of each answer.
        prompt: tokens before the answers.
    """

    def __init__(self, numbers: Tensor, prompt: int, temperature: float, top_p: float) -> None:
        self.numbers, self.prompt, self.temperature, self.top_p = numbers, prompt, temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        probability = (scores.cpu().double() / self.temperature).softmax(1)
        probability, token = probability.sort(descending=True, stable=True)
        kept = probability.cumsum(1) - probability < self.top_p
        reached = (probability * kept).cumsum(1)
        number = self.numbers[:, input_ids.shape[1] - self.prompt, None] * reached[:, -1:]
        place = torch.searchsorted(reached, number, right=True).clamp(max=kept.sum(1, keepdim=True) - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token.gather(1, place).to(scores.device), 0.0)


def _left_padded(prompts: list[list[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """ids and attention mask int64 [n, T]."""
    length = max(map(len, prompts))
    ids = [[filler] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _check(prompts: list[list[int]], tokens: int, config: Any) -> None:
    room = getattr(config, "max_position_embeddings", None)
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise Problem(f"prompt {row}", "it has no tokens", "leave it out, or frame it")
        if room is not None and len(prompt) + tokens > room:
            raise Problem(
                f"prompt {row}",
                f"its {len(prompt)} tokens and {tokens} of an answer go beyond the model's {room} positions",
                f"ask for at most {max(room - len(prompt), 0)} tokens, or leave it out",
            )
