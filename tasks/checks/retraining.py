"""Rules on section `retrain`."""

import json
from collections.abc import Iterator

from compression.core.errors import Problem
from tasks.checks.rule import Rule, targets_match
from tasks.params.base import PARAMS
from tasks.params.imp import MODEL, Imp
from tasks.params.prune import Prune
from tasks.params.quantize import Quantize
from tasks.params.retrain import Retrain
from tasks.params.unlearn import Unlearn

ADAPTERS = ("mask_lora", "scale_lora", "lora_prune", "lora")


def adapters_have_masks(prune: Prune, retrain: Retrain, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Adapters have a mask to learn under."""
    if prune.method == "none" and prune.source == MODEL and retrain.method in ADAPTERS:
        yield Problem(
            f"{PARAMS}: retrain.method",
            f"{retrain.method} trains under the pruning mask, but prune.method is `none`",
            "valid: subset, full, none",
        )


def retraining_is_sound(imp: Imp, retrain: Retrain, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """No key of retraining asks for what its objective does not do, or for a look at text that is not held out."""
    for section, own in (("retrain", retrain), *([("imp.retrain", imp.retrain)] if imp.cycles else [])):
        if own.method == "none":
            continue
        if own.objective != "next_token":
            if own.method == "lora":
                yield Problem(
                    f"{PARAMS}: {section}.objective",
                    f"`{own.objective}` merges each block before the next one, which method lora does not",
                    "valid: next_token; or a method that merges, such as mask_lora",
                )
            for key, off in (
                ("head", False), ("embeddings", False), ("checkpointing", False), ("distillation", 0.0),
                ("held_out", 0), ("search", []),
            ):  # fmt: skip
                if (value := getattr(own, key)) != off:
                    yield Problem(
                        f"{PARAMS}: {section}.{key}",
                        f"`{value}` is for objective next_token, not for {own.objective}",
                        f"valid: {json.dumps(off)}",
                    )
        if own.accumulation % own.processes or (own.processes > 1 and own.objective != "next_token"):
            yield Problem(
                f"{PARAMS}: {section}.processes",
                f"{own.processes} processes cannot share {own.accumulation} batches a step of {own.objective}",
                f"valid: 1, or for objective next_token a divisor of {section}.accumulation",
            )
        if own.objective == "next_token" and own.held_out == 0:
            for key, wanted in (("search", bool(own.search)), ("patience", own.patience > 0)):
                if wanted:
                    yield Problem(
                        f"{PARAMS}: {section}.{key}",
                        f"is judged on text that is not trained on, but {section}.held_out is 0",
                        f"set {section}.held_out to some sequences, 8 say",
                    )
        yield from targets_match(section, own.targets, layers)


def adapter_stays_apart(
    imp: Imp, retrain: Retrain, quantize: Quantize, unlearn: Unlearn, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """Method `lora` leaves an adapter beside the weights, which no later stage may change."""
    if imp.cycles and imp.retrain.method == "lora":
        yield Problem(
            f"{PARAMS}: imp.retrain.method",
            "`lora` leaves an adapter that the next cycle could not prune",
            "valid: any other; mask_lora merges",
        )
    if imp.cycles and imp.retrain.processes > 1:
        yield Problem(f"{PARAMS}: imp.retrain.processes", "a cycle is one process", "valid: 1")
    if retrain.method == "lora":
        for section, method in (("quantize", quantize.method), ("unlearn", unlearn.method)):
            if method != "none":
                yield Problem(
                    f"{PARAMS}: {section}.method",
                    f"`{method}` would change the weights under the adapter of retrain.method lora",
                    "valid: none; or a retrain.method that merges, such as mask_lora",
                )


RULES: list[Rule] = [
    adapters_have_masks,
    retraining_is_sound,
    adapter_stays_apart,
]
