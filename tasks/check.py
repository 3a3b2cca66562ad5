"""`python -m tasks.check`: is params.yaml sound? Said before hours of work start, each fault in a line."""

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from compression.core.errors import Problem
from compression.pruning import METHODS
from compression.pruning.pattern import check_width, make_pattern
from compression.quantization.bits import check_group_size
from tasks.core.paths import DATA
from tasks.params.base import PARAMS, Section, load, nearest, read
from tasks.params.calibrate import Calibrate
from tasks.params.compute import Compute
from tasks.params.corpora import Corpora, Text
from tasks.params.evaluate import Evaluate
from tasks.params.model import Model
from tasks.params.prune import Prune
from tasks.params.quantize import Quantize
from tasks.params.retrain import Retrain
from tasks.params.sensitivity import Sensitivity
from tasks.params.speed import Speed
from tasks.params.unlearn import Unlearn

SECTIONS: list[type[Section]] = [
    Compute, Model, Corpora, Calibrate, Sensitivity, Prune, Retrain, Quantize, Unlearn, Evaluate, Speed,
]  # fmt: skip


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


def pattern_fits(prune: Prune, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """N:M agrees with the sparsity and divides every width."""
    if prune.method == "none":
        return
    try:
        pattern = make_pattern(prune.pattern, prune.sparsity, "row" if prune.scope == "auto" else prune.scope)
        for layer, (_, width) in layers.items():
            check_width(pattern, layer, width)
    except Problem as problem:
        yield problem


def scope_suits_method(prune: Prune, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """The scope is one that the method knows."""
    if prune.method == "none" or prune.scope == "auto":
        return
    valid = import_module(METHODS[prune.method]).SCOPES
    if prune.scope not in valid:
        yield Problem(
            f"{PARAMS}: prune.scope",
            f"`{prune.scope}` is not for {prune.method}",
            "valid: " + ", ".join(["auto", *valid]),
        )


def groups_fit(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """The group size divides every width."""
    if quantize.method == "none":
        return
    try:
        check_group_size(layers, quantize.group_size)
    except Problem as problem:
        yield problem


def ranking_exists(quantize: Quantize, sensitivity: Sensitivity, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Bits are not dealt out by a column that the sensitivity stage does not fill."""
    dealt = quantize.method != "none" and quantize.sensitive_share > 0
    if dealt and quantize.by == "pmpq" and sensitivity.method == "none":
        yield Problem(
            f"{PARAMS}: quantize.by",
            "`pmpq` ranks the blocks, but sensitivity.method is `none`",
            "set sensitivity.method to pmpq, quantize.by to outlier_ratio, or quantize.sensitive_share to 0",
        )


def adapters_have_masks(prune: Prune, retrain: Retrain, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """MaskLoRA has a mask to learn under."""
    if prune.method == "none" and retrain.method == "mask_lora":
        yield Problem(
            f"{PARAMS}: retrain.method",
            "mask_lora trains under the pruning mask, but prune.method is `none`",
            "valid: subset, none",
        )


def text_suffices(
    corpora: Corpora,
    calibrate: Calibrate,
    sensitivity: Sensitivity,
    prune: Prune,
    retrain: Retrain,
    unlearn: Unlearn,
    evaluate: Evaluate,
    layers: dict[str, list[int]],
) -> Iterator[Problem]:
    """No stage asks a role for more tokens than its slice can hold."""
    wanted: list[tuple[str, str, Text, int]] = [
        ("calibrate.sequences", "calibration", corpora.calibration, calibrate.sequences * calibrate.length),
        (
            "sensitivity.sequences",
            "calibration",
            corpora.calibration,
            sensitivity.sequences * sensitivity.length,
        ),
        ("prune.sequences", "calibration", corpora.calibration, prune.sequences * prune.length),
        ("retrain.length", "training", corpora.training, retrain.length),
        ("unlearn.length", "forget", corpora.forget, unlearn.length),
        ("unlearn.length", "training", corpora.training, unlearn.length),
    ]
    forgetting = evaluate.forget_windows * evaluate.forget_length
    for role in ("forget", "control", "retained"):
        wanted.append(("evaluate.forget_windows", role, getattr(corpora, role), forgetting))
    for role, text in corpora.evaluation.items():
        wanted.append(("evaluate.windows", f"evaluation.{role}", text, evaluate.windows * evaluate.length))
    for key, role, text, tokens in wanted:
        start, stop = text.tokens
        if stop is not None and tokens > stop - start:
            yield Problem(
                f"{PARAMS}: {key}",
                f"{tokens:,} tokens are needed of corpora.{role}, whose slice [{start}, {stop}] holds {stop - start:,}",
                "ask for fewer, or widen the slice",
            )


RULES: list[Callable[..., Iterator[Problem]]] = [
    pattern_fits, scope_suits_method, groups_fit, ranking_exists, adapters_have_masks, text_suffices,
]  # fmt: skip


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
