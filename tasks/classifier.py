"""Stage classifier: learns from texts to tell harmful ones, for the answers that evaluate judges.

Writes `data/classifier`: the encoder as a checkpoint of its own, the heads, and classifier.json with what held-out
texts say of them. No text is written or shown.

What would otherwise give the answer away is made alike. Length: a harmless sentence is cut to as many words as a
harmful text drawn at random. Form: beside harmless statements there are harmless requests, forms filled with the titles
of articles. Manner: harmless and harmful texts alike stand behind openings of answers that comply. Declining: refusals
and advice are harmless, and so are refusals that name what they decline, which is a harmful text. As answers are of
more than one sentence, up to `joined` texts of a kind are joined into one.

A text, a form, a title, an opening or a piece of advice is in one part only, the trained or the held-out one.
"""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from compression.core.errors import Problem
from compression.core.files import sha256, write_text
from compression.evaluation.harm import (
    ENCODER,
    HEADS,
    SENTENCE_END,
    held_out_figures,
    open_encoder,
    train,
    write_heads,
)
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
WORDS = 4  # the fewest of a sentence; headings and crumbs have less


class Material(NamedTuple):
    """What the texts of one part are made of, a string each; see section `classifier` of params.yaml."""

    harmful: list[str]
    sentences: list[str]
    requests: list[str]
    topics: list[str]
    answers: list[str]
    refusals: list[str]
    advice: list[str]


@dataclass(frozen=True)
class Texts:
    """What the classifier is trained on, or judged on.

    Attributes:
        harmful: texts by kind: texts, answers (a text behind an opening).
        harmless: sentences, requests, answers, advice.
        declining: refusals, with or without advice, and naming, which tell what they decline. Harmless, too.
    """

    harmful: dict[str, list[str]]
    harmless: dict[str, list[str]]
    declining: dict[str, list[str]]


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
    classifier = train(
        encoder,
        harmful=flat(trained.harmful),
        # What a refusal names is harmful for all that it is declined: the head that looks at the whole does not see it.
        harmless=flat(trained.harmless) + trained.declining.get("refusals", []),
        declining=flat(trained.declining),
        penalty=params.penalty,
        where=f"{PARAMS}: classifier",
    )
    write_heads(classifier, folder / HEADS)
    figures = {
        "trained_on": {
            "harmful": {kind: len(texts) for kind, texts in trained.harmful.items()},
            "harmless": {kind: len(texts) for kind, texts in (trained.harmless | trained.declining).items()},
        },
        "held_out": held_out_figures(classifier, held_out.harmful, held_out.harmless | held_out.declining),
        "files": {name: sha256(folder / name) for name in (HEADS, f"{ENCODER}/manifest.json")},
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
        """Each list split by itself, so that none is missing in a part; one that is empty is left out."""
        halves = [split(own, params.held_out, draw, key) for key, own in named.items()]
        trained, held_out = ([text for half in halves for text in half[side]] for side in (0, 1))
        return trained, held_out

    forms = {key: getattr(params, key) for key in ("requests", "answers", "refusals", "advice")}
    pairs = {
        "harmful": parted(lists),
        "sentences": parted(texts),
        "topics": parted({f"{where}.harmless": topics} if params.requests else {}),
    } | {key: parted({f"{where}.{key}": own} if own else {}) for key, own in forms.items()}
    trained, held_out = (
        compose(Material(**{key: pair[side] for key, pair in pairs.items()}), params.joined, draw) for side in (0, 1)
    )
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
    return list(dict.fromkeys(each for each in SENTENCE_END.split(text) if len(each.split()) >= WORDS)), titles


def compose(part: Material, joined: int, draw: Draw) -> Texts:
    """The texts of one part: as many requests as sentences, and as many that decline, of which half name what."""
    lengths = [len(text.split()) for text in part.harmful]
    harmful = join(part.harmful, joined, draw)
    cut = [" ".join(text.split()[: max(WORDS, draw.one(lengths))]) for text in part.sentences]
    sentences = join(cut, joined, draw)
    requests = [draw.one(part.requests).replace("{}", draw.one(part.topics)) for _ in cut if part.requests]
    advice = [draw.one(part.advice) for _ in cut if part.advice]
    declining: tuple[list[str], list[str]] = ([], [])
    for number in range(len(cut) if part.refusals else 0):
        said = [draw.one(part.refusals)]
        said += [draw.one(part.harmful)] if number % 2 else []
        said += [draw.one(part.advice)] if number % 4 > 1 and part.advice else []
        declining[number % 2].append(" ".join(said))

    def complying(texts: list[str]) -> list[str]:
        return [f"{draw.one(part.answers)} {text}" for text in texts if part.answers]

    return Texts(
        _kinds(texts=harmful, answers=complying(harmful)),
        _kinds(
            sentences=sentences,
            requests=join(requests, joined, draw),
            answers=complying(sentences),
            advice=join(advice, joined, draw),
        ),
        _kinds(refusals=declining[0], naming=declining[1]),
    )


def _kinds(**kinds: list[str]) -> dict[str, list[str]]:
    """Each text once, without kinds that have none."""
    return {kind: list(dict.fromkeys(texts)) for kind, texts in kinds.items() if texts}


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


def flat(kinds: Mapping[str, list[str]]) -> list[str]:
    """The texts of all kinds."""
    return [text for texts in kinds.values() for text in texts]


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
