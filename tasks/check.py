"""`python -m tasks.check`: is params.yaml sound? Said before hours of work start, each fault in a line."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from compression.core.errors import Problem
from tasks.checks import forgetting, pruning, quantizing, retraining, texts
from tasks.core.paths import DATA
from tasks.params.allocate import Allocate
from tasks.params.answers import Answers
from tasks.params.attack import Attack
from tasks.params.base import PARAMS, Section, load, nearest, read
from tasks.params.calibrate import Calibrate
from tasks.params.classifier import Classifier
from tasks.params.compute import Compute
from tasks.params.corpora import Corpora
from tasks.params.evaluate import Evaluate
from tasks.params.export import Export
from tasks.params.imp import Imp
from tasks.params.model import Model
from tasks.params.prune import Prune
from tasks.params.quantize import Quantize
from tasks.params.retrain import Retrain
from tasks.params.sensitivity import Sensitivity
from tasks.params.speed import Speed
from tasks.params.surgeon import Surgeon
from tasks.params.teach import Teach
from tasks.params.unlearn import Unlearn

SECTIONS: list[type[Section]] = [
    Compute, Model, Answers, Corpora, Teach, Calibrate, Sensitivity, Allocate, Imp, Prune, Surgeon, Retrain, Quantize,
    Unlearn, Attack, Export, Classifier, Evaluate, Speed,
]  # fmt: skip
RULES = pruning.RULES + quantizing.RULES + retraining.RULES + forgetting.RULES + texts.RULES


def problems(document: dict[str, Any], layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Every fault of a params.yaml that can be told without computing.

    Args:
        document: the file's content.
        layers: shape [out, in] of each linear by name, as the model's manifest has them; empty if it has not
            been downloaded yet.
    """
    known = [model.section for model in SECTIONS]
    for name in document:
        if name not in known:
            yield Problem(str(PARAMS), f"unknown section `{name}`; {nearest(name, known)}")
    sections: dict[type[Section], Any] = {}
    for model in SECTIONS:
        try:
            sections[model] = read(model, document)
        except Problem as problem:
            yield problem
    for rule in RULES:
        # A rule says by the types of its arguments which sections it needs; `layers` and the result come last.
        needed = list(rule.__annotations__.values())[:-2]
        if all(model in sections for model in needed):
            yield from rule(*(sections[model] for model in needed), layers)


def main() -> None:
    manifest = DATA / "model" / "manifest.json"
    layers = json.loads(manifest.read_text(encoding="utf-8"))["layers"] if manifest.exists() else {}
    try:
        found = list(problems(load(), layers))
    except Problem as problem:
        found = [problem]
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    if found:
        sys.exit(1)


if __name__ == "__main__":
    main()
