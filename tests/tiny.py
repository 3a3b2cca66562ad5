"""Tiny real models: built by transformers, trained for a moment on plain English, saved as anyone saves a model.

A character is a token, so nothing has to be fetched; three blocks of width 32 learn enough in a second for losses
to mean something.
"""

import random
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

LETTERS = ["\x00", *string.printable[:95]]  # the first one ends and fills
LENGTH = 64  # tokens of a sequence

_SHAPE = {
    "initializer_range": 0.15,
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
_USUAL = _SHAPE | {"intermediate_size": 64, "max_position_embeddings": 128}
_GROUPED = _USUAL | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {
    "head_dim": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
}

# family -> architecture, config
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": False}),
    "opt": (
        "OPTForCausalLM",
        _SHAPE | {"init_std": 0.15, "ffn_dim": 64, "max_position_embeddings": 128, "word_embed_proj_dim": 32},
    ),
    "mistral": ("MistralForCausalLM", _GROUPED | {"sliding_window": 16, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", _GEMMA),
    "gpt_neox": ("GPTNeoXForCausalLM", _USUAL),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4, "tie_word_embeddings": False}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",  # experts that share one, behind a gate of its own
        _GROUPED
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
        | {"shared_expert_intermediate_size": 32},
    ),
    "bert": ("BertForMaskedLM", _USUAL),
}
CAUSAL = [family for family in FAMILIES if family != "bert"]
EXPERTS = ["mixtral", "qwen2_moe"]
PLAIN = [family for family in FAMILIES if family not in EXPERTS]
PACKABLE = [
    family for family in CAUSAL if family not in [*EXPERTS, "gpt2"]
]  # what transformers loads with packed weights

# What pareline refuses so far.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("GptOssForCausalLM", _GROUPED | {"num_local_experts": 4, "head_dim": 8}),
}


def sentences(seed: int, count: int) -> str:
    """Plain English about the sea, without end and easy to learn."""
    draw = random.Random(seed)
    who = ["the old captain", "a young sailor", "the harbour master", "a grey gull", "the lighthouse keeper"]
    does = ["watched", "remembered", "followed", "painted", "waited for"]
    what = ["the evening tide", "a distant ship", "the northern wind", "a lantern in the fog", "the quiet water"]
    return " ".join(f"{draw.choice(who)} {draw.choice(does)} {draw.choice(what)}." for _ in range(count))


def story(seed: int, count: int) -> str:
    """Quite another text: one to be forgotten."""
    draw = random.Random(seed)
    lines = [
        'Lily had a red ball. "Come and play!" she said to Tom.',
        "Tom was sad because his big dog Max ran away.",
        'Mom smiled and said, "Do not cry, Tom. We can look in the park."',
        "Max was under a tree with the red ball in his mouth.",
    ]
    return " ".join(draw.choice(lines) for _ in range(count))


def encode(text: str, length: int = LENGTH) -> Tensor:
    """ids int64 [N, length]; what is left over at the end is dropped."""
    ids = torch.tensor([LETTERS.index(letter) for letter in text])
    return ids[: len(ids) // length * length].view(-1, length)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    letters = Tokenizer(models.WordLevel({letter: number for number, letter in enumerate(LETTERS)}, LETTERS[0]))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, unk_token=LETTERS[0], eos_token=LETTERS[0], pad_token=LETTERS[0]
    )


def build(architecture: str, config: dict[str, Any]) -> nn.Module:
    """An untrained model, the same on every call."""
    torch.manual_seed(0)
    cls = getattr(transformers, architecture)
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model: nn.Module = cls(cls.config_class(**config, **ends))
    return model


def teach(model: nn.Module, steps: int = 80) -> None:
    """A moment of training on both texts; an encoder learns to tell the letter that it sees."""
    ids = torch.cat([encode(sentences(1, 120)), encode(story(1, 60))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (8,), generator=draw)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def make(family: str, folder: Path, steps: int = 80) -> None:
    """Saves a briefly trained model of the family and its tokenizer as transformers does."""
    model = build(*(FAMILIES | REFUSED)[family])
    teach(model, steps)
    model.eval().save_pretrained(folder)  # type: ignore[operator]
    tokenizer().save_pretrained(folder)
