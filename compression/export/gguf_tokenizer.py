"""A byte-level BPE tokenizer as the metadata of a GGUF file."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from compression.core.errors import Problem


def add_tokenizer(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Adds tokens, merges, special tokens and chat template.

    Args:
        folder: where tokenizer.json and its companions lie.
        rows: of the embedding; those without a token get a name that is never looked for.

    Raises:
        Problem: no tokenizer.json, more tokens than rows, or text split in a way that GGUF has no name for.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        raise Problem(str(file), "there is no such file", "GGUF is written for tokenizers in this format")
    tokenizer = Tokenizer.from_file(str(file))
    described = json.loads(tokenizer.to_str())  # the file as the library understands it, every default filled in
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) >= rows:
        raise Problem(str(file), f"{max(vocabulary.values()) + 1} tokens, but the model has embeddings for {rows}")
    tokens, types = [f"[PAD{row}]" for row in range(rows)], [TokenType.UNUSED] * rows
    for token, row in vocabulary.items():
        tokens[row], types[row] = token, TokenType.NORMAL
    for added in described["added_tokens"]:
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # what GGUF calls byte-level BPE
    writer.add_tokenizer_pre(_splitting(described, _noted(folder), str(file)))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    ids = tokenizer.encode("a").ids  # what is added to a text, by trying: templates have many ways to say it
    special.add_special_token = {
        "bos": ids[:1] == [special.special_token_ids.get("bos")],
        "eos": ids[-1:] == [special.special_token_ids.get("eos")],
    }
    special.add_to_gguf(writer, quiet=True)


def _noted(folder: Path) -> str | None:
    """What the GGUF file that the checkpoint was made of called its way to split text; see compression.importing."""
    file = folder / "tokenizer_config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("gguf_pre") if file.exists() else None


def _splitting(described: dict[str, Any], noted: str | None, where: str) -> str:
    """llama.cpp's name for the way in which text is split before merging: what was noted, or what it looks like.

    Raises:
        Problem: the tokenizer is of another kind, or splits in a way that has no name here.
    """
    model, normalizer, pre = (described[part] or {} for part in ("model", "normalizer", "pre_tokenizer"))
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if model["type"] == "BPE" and kinds[-1] == "ByteLevel" and normalizer.get("type") in (None, "NFC"):
        if noted:
            return noted
        own_pattern = steps[-1]["use_regex"] and not steps[-1]["add_prefix_space"]
        if kinds == ["ByteLevel"] and own_pattern:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and own_pattern:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[-1]["use_regex"]:
            pattern = steps[0]["pattern"].get("Regex")
            if name := next((name for name, known in GGUF_PRE_TOKENIZER_SPLITS.items() if known == pattern), None):
                return str(name)
    raise Problem(
        where,
        "not a tokenizer that GGUF has a name for",
        "supported: byte-level BPE that splits text like GPT-2, SmolLM, Llama 3, Qwen 2, Tekken or GPT-4o",
    )
