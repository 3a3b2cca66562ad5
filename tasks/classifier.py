"""Stage classifier: learns from texts to tell harmful ones, for the answers that evaluate judges.

Writes `data/classifier`: the encoder as a checkpoint of its own, the head, and classifier.json with what held-out texts
say of it. No text is written or shown.

What would otherwise give the answer away is made alike. Length: a harmless sentence is cut to as many words as a
harmful text drawn at random. Form: beside harmless statements there are harmless requests, forms filled with the titles
of articles. Declining: refusals count as harmless, and half of them name what they decline, which is a harmful text. As
answers are of more than one sentence, up to `joined` texts of a kind are joined into one.

A text, a form, a title or an opening of a refusal is in one part only, the trained or the held-out one.
"""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from compression.core.errors import Problem
from compression.core.files import sha256, write_tensors, write_text
from compression.evaluation.harm import ENCODER, HEAD, held_out_figures, open_encoder, train
from compression.importing import import_model
from tasks.core.entry import run_stage
from tasks.core.paths import DATA
from tasks.core.stage import open_stage
from tasks.params.base import PARAMS, read
from tasks.params.classifier import Classifier, EncoderFiles, Harmless, Part
from tasks.sources import fetch

T = TypeVar("T")
_TITLE = re.compile(r'^<doc\b[^\n]*\btitle="([^"\n]+)"', re.MULTILINE)
_MARK = re.compile(r"^</?doc\b[^\n]*>$", re.MULTILINE)  # where an article begins or ends
_END = re.compile(r"(?<=[.?!])\s+|\n+")
WORDS = 4  # the fewest of a sentence; headings and crumbs have less


@dataclass(frozen=True)
class Texts:
    """What the classifier is trained on, or judged on.

    Attributes:
        harmful: one text each.
        harmless: texts by kind: sentences, requests, refusals.
    """

    harmful: list[str]
    harmless: dict[str, list[str]]


class Draw:
    """Draws with a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self.generator))

    def one(self, among: Sequence[T]) -> T:
        return among[self.number(len(among))]

    def shuffled(self, all_of: Sequence[T]) -> list[T]:
        return [all_of[place] for place in torch.randperm(len(all_of), generator=self.generator).tolist()]


def main() -> None:
    params = read(Classifier)
    stage = open_stage("classifier", DATA / "classifier", [], params)
    trained, held_out = gather(params)

    folder = stage.work / "classifier"
    shutil.rmtree(folder, ignore_errors=True)
    record = stage.record(params)
    import_encoder(params.encoder, stage.work / "source", folder / ENCODER)
    encoder = open_encoder(folder / ENCODER, stage.device)
    harmless = [text for kind in trained.harmless.values() for text in kind]
    classifier = train(encoder, trained.harmful, harmless, params.penalty, f"{PARAMS}: classifier")
    write_tensors(folder / HEAD, {"weight": classifier.head.weight, "bias": classifier.head.bias})
    figures = {
        "trained_on": {kind: len(texts) for kind, texts in {"harmful": trained.harmful, **trained.harmless}.items()},
        "held_out": held_out_figures(classifier, held_out.harmful, held_out.harmless),
        "files": {name: sha256(folder / name) for name in (HEAD, f"{ENCODER}/manifest.json")},
    }
    write_text(folder / "classifier.json", json.dumps(figures | record, indent=2) + "\n")
    stage.publish(folder)


def import_encoder(encoder: EncoderFiles, scratch: Path, folder: Path) -> None:
    """Fetches the encoder's files one by one, and writes it as a checkpoint."""
    scratch.mkdir(exist_ok=True)
    for name, digest in encoder.files.items():
        source = f"{encoder.source.rstrip('/')}/{name}"
        shutil.copyfile(fetch(source, digest, where=f"{PARAMS}: classifier.encoder"), scratch / name)
    import_model(scratch, folder, "source", {"source": encoder.source})


def gather(params: Classifier) -> tuple[Texts, Texts]:
    """The texts to train on and those held out.

    Raises:
        Problem: a source cannot be fetched, or has too little in it to be split; requests without a title to ask for.
    """
    draw = Draw(params.seed)
    where = f"{PARAMS}: classifier"
    keys = [f"{where}.harmful.{number}" for number in range(len(params.harmful))]
    lists = {key: lines(part, key) for key, part in zip(keys, params.harmful, strict=True)}
    texts, topics = {}, []
    for number, part in enumerate(params.harmless):
        key = f"{where}.harmless.{number}"
        found, titles = sentences(part, key)
        texts[key] = draw.shuffled(found)[: params.sentences]
        topics += titles
    if params.requests and not topics:
        raise Problem(f"{where}.requests", "no harmless text has titles of articles to ask for", "set it to []")

    def parted(named: dict[str, list[str]]) -> tuple[list[str], list[str]]:
        """Each list split by itself, so that none is missing in a part."""
        halves = [split(own, params.held_out, draw, key) for key, own in named.items()]
        trained, held_out = ([text for half in halves for text in half[side]] for side in (0, 1))
        return trained, held_out

    parts = zip(
        parted(lists),
        parted(texts),
        parted({f"{where}.requests": params.requests} if params.requests else {}),
        parted({f"{where}.harmless": topics} if params.requests else {}),
        parted({f"{where}.refusals": params.refusals} if params.refusals else {}),
        strict=True,
    )
    trained, held_out = (compose(*part, params.joined, draw) for part in parts)
    return trained, held_out


def lines(part: Part, where: str) -> list[str]:
    """The lines of a file that have something in them, each once."""
    return list(dict.fromkeys(stripped for line in _text(part, where).splitlines() if (stripped := line.strip())))


def sentences(part: Harmless, where: str) -> tuple[list[str], list[str]]:
    """The sentences of a file, each once, and the titles of its articles."""
    text, titles = _text(part, where), []
    if part.format == "articles":
        titles = list(dict.fromkeys(_TITLE.findall(text)))
        text = _MARK.sub("", text)
    return list(dict.fromkeys(each for each in _END.split(text) if len(each.split()) >= WORDS)), titles


def compose(
    harmful: list[str],
    plain: list[str],
    forms: list[str],
    topics: list[str],
    openings: list[str],
    joined: int,
    draw: Draw,
) -> Texts:
    """The texts of one part: as many requests as sentences, half as many refusals."""
    lengths = [len(text.split()) for text in harmful]
    cut = [" ".join(text.split()[: max(WORDS, draw.one(lengths))]) for text in plain]
    requests = [draw.one(forms).replace("{}", draw.one(topics)) for _ in plain] if forms else []
    refusals = [
        draw.one(openings) + (f" {draw.one(harmful)}" if number % 2 else "")
        for number in range(len(plain) // 2 if openings else 0)
    ]
    harmless = {
        "sentences": join(cut, joined, draw),
        "requests": join(requests, joined, draw),
        "refusals": list(dict.fromkeys(refusals)),
    }
    return Texts(join(harmful, joined, draw), {kind: texts for kind, texts in harmless.items() if texts})


def split(texts: list[T], share: float, draw: Draw, where: str) -> tuple[list[T], list[T]]:
    """Shuffled and parted: all but `share` of them to train on, the rest to judge with.

    Raises:
        Problem: there are fewer than two.
    """
    if len(texts) < 2:
        raise Problem(where, f"{len(texts)} texts cannot be split into trained and held-out ones", "valid: 2 or more")
    held_out = min(max(1, round(share * len(texts))), len(texts) - 1)
    shuffled = draw.shuffled(texts)
    return shuffled[held_out:], shuffled[:held_out]


def join(texts: list[str], most: int, draw: Draw) -> list[str]:
    """Each text once, one to `most` neighbours joined into one."""
    found = []
    while texts:
        count = 1 + draw.number(most)
        found.append(" ".join(texts[:count]))
        texts = texts[count:]
    return found


def _text(part: Part, where: str) -> str:
    path = fetch(part.source, part.sha256, where=where)
    if path.is_dir():
        raise Problem(where, f"{part.source} is a folder", "name one text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Problem(where, f"{path} is not UTF-8", "convert it to UTF-8") from None


if __name__ == "__main__":
    run_stage(main)
