"""Stage `corpus`: fetches the texts, tokenises them, and cuts out the slice of each role.

Writes `<role>.safetensors` with one tensor `tokens` (int32, 1-D, ids of the model's tokenizer) and, as
metadata, where they come from. Role `evaluation` has one file per text, in a folder of its own.
"""

import hashlib
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import AutoTokenizer

from compression.core.errors import Problem
from tasks import sources
from tasks.core.entry import run_stage
from tasks.params import base
from tasks.params.corpora import Corpora, Text

MODEL = Path("data/model")
OUT = Path("data/corpora")

# A role that judges, and the roles it may share no token with: what was learned from cannot judge.
APART = {
    "evaluation": ("calibration", "training", "forget"),
    "retained": ("training", "forget"),
    "control": ("forget",),
}
_OPENING = re.compile(r"^<doc\b[^\n]*>$", re.MULTILINE)
_ARTICLE = re.compile(r"^<doc\b[^\n]*>\n(.*?)^</doc>", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Tokenised:
    """A whole text in tokens.

    Attributes:
        tokens: int32, 1-D.
        file: SHA-256 of the text's file.
        documents: SHA-256 of what was tokenised: the whole file, or its articles.
    """

    tokens: np.ndarray
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

    whole: dict[tuple[str, str | None, str], Tokenised] = {}
    found: dict[str, Tokenised] = {}
    for role, text in tqdm(roles.items(), desc="corpus", unit="text", disable=None):
        key = (text.source, text.sha256, text.format)
        if key not in whole:
            whole[key] = tokenise(text, role, tokenizer, vocabulary)
        found[role] = whole[key]
    # again, now that the hashes tell when two addresses lead to the same bytes
    refuse_overlaps({role: text.model_copy(update={"sha256": found[role].file}) for role, text in roles.items()})
    files = {role: encode(cut(found[role].tokens, text, role), text, found[role]) for role, text in roles.items()}

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        for role, content in files.items():
            path = Path(folder, "new", f"{role}.safetensors")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if out.exists():
            out.rename(Path(folder, "old"))
        Path(folder, "new").rename(out)


def refuse_overlaps(roles: dict[str, Text]) -> None:
    """Keeps the texts that judge apart from those that are learned from, as `APART` says.

    Two texts are the same when their sources or their hashes are.

    Raises:
        Problem: two roles share tokens, or might: token counts of different formats cannot be compared.
    """
    for judge, text in roles.items():
        for other in APART.get(judge.partition("/")[0], ()):
            learned = roles[other]
            same_hash = text.sha256 is not None and text.sha256 == learned.sha256
            if text.source != learned.source and not same_hash:
                continue
            hint = f"give {_name(judge)} other tokens than {_name(other)}, or another text"
            if text.format != learned.format:
                what = f"the same text as corpora.{_name(other)}, in another format, so they may overlap"
                raise Problem(_where(judge, "format"), what, hint)
            start = max(text.tokens.start, learned.tokens.start)
            stops = [stop for stop in (text.tokens.stop, learned.tokens.stop) if stop is not None]
            if not stops or start < min(stops):
                shared = f"{start} to {min(stops) if stops else 'the end'}"
                what = f"tokens {shared} are also in corpora.{_name(other)}, and would flatter the result"
                raise Problem(_where(judge, "tokens"), what, hint)


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


def tokenise(text: Text, role: str, tokenizer: Any, vocabulary: int) -> Tokenised:
    """Fetches and tokenises a whole text, as one string and without special tokens.

    Args:
        text: what to fetch.
        role: that asks for it, to name in messages.
        tokenizer: of transformers.
        vocabulary: number of token ids that the model knows.

    Raises:
        Problem: the text cannot be fetched, is not UTF-8, is empty, has no articles though it should,
            or gives ids that the model does not know.
    """
    path = sources.fetch(text.source, text.sha256, where=_where(role, "source"))
    if path.is_dir():
        raise Problem(_where(role, "source"), f"{text.source} is a folder", "name one text file")
    content = path.read_bytes()
    try:
        documents = content.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}"
        raise Problem(_where(role, "source"), what, "convert it to UTF-8") from None
    if text.format == "articles":
        documents = articles(documents, role)
    if not documents.strip():
        raise Problem(_where(role, "source"), f"{path} has no text in it")
    # verbose=False: it would warn that the text is longer than the model's context, which is as it should be
    encoded = tokenizer(documents, add_special_tokens=False, truncation=False, verbose=False)
    tokens = np.asarray(encoded["input_ids"], dtype=np.int32)
    if tokens.max() >= vocabulary:
        what = f"the tokenizer gives token {tokens.max()}, and the model's vocabulary ends at {vocabulary - 1}"
        raise Problem(_where(role, "source"), what, "tokenizer and weights are not of the same model")
    return Tokenised(tokens, _sha256(content), _sha256(documents.encode()))


def articles(document: str, role: str) -> str:
    """What stands between `<doc ...>` and `</doc>`, titles included; an empty line between two articles.

    Raises:
        Problem: there are none, or one is not closed.
    """
    opened, found = len(_OPENING.findall(document)), _ARTICLE.findall(document)
    if not found and not opened:
        raise Problem(_where(role, "format"), "the text has no <doc ...> lines", "plain text is `format: text`")
    if len(found) != opened:
        what = f"{opened} articles begin with <doc ...>, but {len(found)} end with </doc>"
        raise Problem(_where(role, "source"), what, "the file is cut off or not in this format")
    return "\n\n".join(stripped for article in found if (stripped := article.strip()))


def cut(tokens: np.ndarray, text: Text, role: str) -> np.ndarray:
    """The slice of a text's tokens that a role asks for.

    Raises:
        Problem: the text ends before the slice does.
    """
    start, stop = text.tokens.start, text.tokens.stop
    if start >= tokens.size or (stop or 0) > tokens.size:
        asked = f"[{start}, {'null' if stop is None else stop}]"
        what = f"{asked} goes beyond the text, which has {tokens.size} tokens"
        raise Problem(_where(role, "tokens"), what, "ask for fewer, or take a longer text")
    return tokens[start:stop]


def encode(tokens: np.ndarray, text: Text, whole: Tokenised) -> bytes:
    """A safetensors file of a slice: the same bytes every time.

    Written by hand because the library writes the metadata in another order in each process.
    """
    metadata = {
        "source": text.source,
        "sha256": whole.file,
        "format": text.format,
        "from": str(text.tokens.start),
        "to": str(text.tokens.start + tokens.size),
        "documents": whole.documents,
    }
    data = tokens.astype("<i4").tobytes()
    entry = {"dtype": "I32", "shape": [tokens.size], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, "tokens": entry}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data starts at a multiple of 8 bytes
    return len(header).to_bytes(8, "little") + header + data


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _name(role: str) -> str:
    return role.replace("/", ".")


def _where(role: str, key: str) -> str:
    return f"{base.PARAMS}: corpora.{_name(role)}.{key}"


if __name__ == "__main__":
    run_stage(main)
