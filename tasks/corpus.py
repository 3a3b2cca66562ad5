"""Stage `corpus`: fetches the texts, tokenises them, and cuts out the slice of each role.

Writes `<role>.safetensors` with one tensor `tokens` (int32, 1-D, ids of the model's tokenizer), or for questions and
answers `ids` (int32) and `answer` (uint8) of shape [N, T], and, as metadata, where they come from. Role `evaluation`
has one file per text, in a folder of its own. A role that params.yaml leaves out has a file without tokens.
"""

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from compression.core.errors import Problem
from tasks import sources
from tasks.apart import refuse_overlaps, refuse_shared_sentences
from tasks.articles import articles
from tasks.core.entry import run_stage
from tasks.pairs import Row, encode_pairs, read_rows, read_utf8
from tasks.params import base
from tasks.params.corpora import Corpora, Pairs, Text, key
from tasks.sources.cache import digest

MODEL = Path("data/model")
OUT = Path("data/corpora")

TYPES = {"int32": "I32", "uint8": "U8"}  # as safetensors calls them
UNSAFE = ("forget", "control")  # roles whose answers are those that are to be unlearned, or like them


@dataclass(frozen=True)
class Whole:
    """A whole text in tokens, or all questions of a source.

    Attributes:
        content: int32, 1-D; or rows.
        file: SHA-256 of the text's file.
        documents: SHA-256 of what was tokenised: the whole file, or its articles.
    """

    content: np.ndarray | list[Row]
    file: str
    documents: str


def main() -> None:
    """Runs the stage as params.yaml describes it."""
    build_corpora(base.read(Corpora), MODEL, OUT)


def build_corpora(params: Corpora, model: Path, out: Path) -> None:
    """Writes a file of tokens for each role, replacing what is in `out`; all of them or none.

    Args:
        params: what each role reads.
        model: checkpoint folder with the tokenizer and `config.json`.
        out: folder to write.

    Raises:
        Problem: there is no tokenizer; a text cannot be fetched or read, is too short, or does not fit the
            tokenizer; or a role that judges overlaps one that is learned from.
    """
    roles = params.roles()
    refuse_overlaps(roles)  # before minutes of work
    tokenizer, vocabulary = load_tokenizer(model)

    whole: dict[tuple[str, str | None, str], Whole] = {}
    found: dict[str, Whole] = {}
    for role, text in tqdm(roles.items(), desc="corpus", unit="text", disable=None):
        origin = (text.source, text.sha256, text.format)
        if origin not in whole:
            whole[origin] = fetch(text, role, tokenizer)
        found[role] = whole[origin]
    # again, now that the hashes tell when two addresses lead to the same bytes
    refuse_overlaps({role: text.model_copy(update={"sha256": found[role].file}) for role, text in roles.items()})
    parts = {role: cut(found[role].content, text, role) for role, text in roles.items()}
    refuse_shared_sentences(parts, roles, tokenizer)
    files = {"neighbours": nothing()}
    for role, text in roles.items():
        tensors = in_tokens(parts[role], text, role, tokenizer)
        largest = max(int(tensor.max()) for tensor in tensors.values())
        if largest >= vocabulary:
            what = f"the tokenizer gives token {largest}, and the model's vocabulary ends at {vocabulary - 1}"
            raise Problem(key(role, "source"), what, "tokenizer and weights are not of the same model")
        files[role] = encode(tensors, text, len(parts[role]), found[role])

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        for role, content in files.items():
            path = Path(folder, "new", f"{role}.safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if out.exists():
            out.rename(Path(folder, "old"))
        Path(folder, "new").rename(out)


def load_tokenizer(model: Path) -> tuple[Any, int]:
    """The tokenizer in a checkpoint folder, and how many token ids the model knows.

    Raises:
        Problem: one of them is not there.
    """
    hint = "run the stage download first: dvc repro download"
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        vocabulary = config["vocab_size"] if "vocab_size" in config else config["text_config"]["vocab_size"]
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    except FileNotFoundError:
        raise Problem(str(model), "there is no model here, so no tokenizer either", hint) from None
    except KeyError:
        raise Problem(str(model / "config.json"), "vocab_size is missing", hint) from None
    except (OSError, ValueError) as error:
        raise Problem(str(model), f"there is no tokenizer here ({str(error).splitlines()[0]})", hint) from None
    return tokenizer, int(vocabulary)


def fetch(text: Text | Pairs, role: str, tokenizer: Any) -> Whole:
    """Fetches a whole text and tokenises it as one string, without special tokens; or reads all questions of a source.

    Args:
        text: what to fetch.
        role: that asks for it, to name in messages.
        tokenizer: of transformers.

    Raises:
        Problem: the text cannot be fetched, is not UTF-8, is empty, has no articles though it should, or is not of a
            schema of questions and answers.
    """
    where = key(role, "source")
    path = sources.fetch(text.source, text.sha256, where=where)
    if path.is_dir():
        raise Problem(where, f"{text.source} is a folder", "name one text file")
    file = digest(path)
    if isinstance(text, Pairs):
        return Whole(read_rows(path, text.format, key(role)), file, file)
    documents = read_utf8(path, where)
    if text.format == "articles":
        documents = "\n\n".join(articles(documents, key(role)))
    if not documents.strip():
        raise Problem(where, f"{path} has no text in it")
    # verbose=False: it would warn that the text is longer than the model's context, which is as it should be
    encoded = tokenizer(documents, add_special_tokens=False, truncation=False, verbose=False)
    tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
    return Whole(tokens, file, hashlib.sha256(documents.encode()).hexdigest())


def cut(content: np.ndarray | list[Row], text: Text | Pairs, role: str) -> np.ndarray | list[Row]:
    """The slice that a role asks for of a text's tokens, or of a source's questions.

    Raises:
        Problem: the text ends before the slice does.
    """
    start, stop = text.slice
    if start >= len(content) or (stop or 0) > len(content):
        asked = f"[{start}, {'null' if stop is None else stop}]"
        what = f"{asked} goes beyond the text, which has {len(content)} {text.unit}"
        raise Problem(key(role, text.unit), what, "ask for fewer, or take a longer text")
    return content[start:stop]


def in_tokens(part: np.ndarray | list[Row], text: Text | Pairs, role: str, tokenizer: Any) -> dict[str, np.ndarray]:
    """The tensors of a role's file, by name.

    Raises:
        Problem: none of the questions has an answer of the kind that the role takes.
    """
    if isinstance(part, np.ndarray) or isinstance(text, Text):
        return {"tokens": np.asarray(part)}
    ids, answer = encode_pairs(part, role in UNSAFE, tokenizer, text.frame, key(role))
    return {"ids": ids, "answer": answer}


def encode(tensors: dict[str, np.ndarray], text: Text | Pairs, count: int, whole: Whole) -> bytes:
    """A safetensors file of a slice: the same bytes every time.

    Written by hand because the library writes the metadata in another order in each process.

    Args:
        count: tokens or rows in the slice.
    """
    metadata = {
        "source": text.source,
        "sha256": whole.file,
        "format": text.format,
        "from": str(text.slice.start),
        "to": str(text.slice.start + count),
        "documents": whole.documents,
    }
    if isinstance(text, Pairs):
        metadata["frame"] = text.frame
    entries: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, tensor in tensors.items():
        content = tensor.astype(tensor.dtype.newbyteorder("<")).tobytes()
        place = [len(data), len(data) + len(content)]
        entries[name] = {"dtype": TYPES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": place}
        data += content
    return _file(entries, data)


def nothing() -> bytes:
    """The file of a role that is left out."""
    return _file({"tokens": {"dtype": TYPES["int32"], "shape": [0], "data_offsets": [0, 0]}}, b"")


def _file(entries: dict[str, Any], data: bytes) -> bytes:
    """A safetensors file: its header, filled up so that the data starts at a multiple of 8 bytes, and the data."""
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data


if __name__ == "__main__":
    run_stage(main)
