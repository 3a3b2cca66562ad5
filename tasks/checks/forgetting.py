"""Rules on sections `teach`, `unlearn` and `attack`."""

import json
import re
from collections.abc import Iterator
from importlib import import_module

from compression.core.errors import Problem
from compression.quantization.bits import check_group_size
from compression.unlearning import METHODS as OBJECTIVES
from tasks.checks.rule import Rule, targets_match
from tasks.params.attack import Attack
from tasks.params.base import PARAMS
from tasks.params.quantize import Quantize
from tasks.params.teach import Teach
from tasks.params.unlearn import Unlearn

BLOCK = re.compile(r"\.(\d+)\.")  # in a layer's name, the number of its block


def taught_layers_exist(teach: Teach, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Every pattern for layers that learn the text matches one."""
    if teach.method != "none":
        yield from targets_match("teach", teach.targets, layers)


def unlearning_is_sound(
    unlearn: Unlearn, teach: Teach, quantize: Quantize, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """The objective finds what it reads, the layers that learn are there, and there is a model to compare with."""
    if unlearn.method == "none":
        return
    for key, papers in import_module(OBJECTIVES[unlearn.method]).SETTINGS.items():
        if (value := getattr(unlearn, key)) is None or value == []:
            yield Problem(
                f"{PARAMS}: unlearn.{key}",
                f"{unlearn.method} reads it, but it is {json.dumps(value)}",
                f"set it; the paper has {json.dumps(papers)}",
            )
    if unlearn.train == "scales" and quantize.method == "none":
        yield Problem(f"{PARAMS}: unlearn.train", "`scales` of a grid, but quantize.method is `none`", "valid: codes")
    yield from targets_match("unlearn", unlearn.targets, layers)
    depth = len({number for layer in layers for number in BLOCK.findall(layer)[:1]})
    if unlearn.method == "rmu" and layers and (unlearn.block or 0) >= depth:
        yield Problem(f"{PARAMS}: unlearn.block", f"there is no block {unlearn.block}", f"valid: 0 to {depth - 1}")
    if unlearn.prompt >= unlearn.length:
        yield Problem(
            f"{PARAMS}: unlearn.prompt",
            f"a prompt of {unlearn.prompt} tokens in sequences of {unlearn.length} leaves no answer",
            f"valid: 1 to {unlearn.length - 1}",
        )
    if unlearn.forget_ceiling == "reference" and teach.method == "none":
        yield Problem(
            f"{PARAMS}: unlearn.forget_ceiling",
            "`reference` is the loss of the model that was never taught, but teach.method is `none`",
            "valid: a loss in nats a token, or null",
        )


def attacks_fit(attack: Attack, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Windows reach beyond their prompt, and the grid's groups divide every width."""
    if attack.prompt >= attack.length:
        yield Problem(
            f"{PARAMS}: attack.prompt",
            f"{attack.prompt} tokens leave nothing to judge of windows of {attack.length}",
            f"less than attack.length, {attack.length}",
        )
    if attack.requantize:
        try:
            check_group_size(layers, attack.group_size, "attack.group_size")
        except Problem as problem:
            yield problem


RULES: list[Rule] = [
    taught_layers_exist,
    unlearning_is_sound,
    attacks_fit,
]
