"""Rules on what goes: sections `imp`, `allocate` and `prune`."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from importlib import import_module

from compression.core.errors import Problem
from compression.pruning import METHODS
from compression.pruning.allocation import check_rule, reachable_budget
from compression.pruning.pattern import NofM, Structured, check_width, make_pattern, parse_pattern, parse_structures
from compression.quantization.bits import check_group_size
from tasks.checks.rule import Rule
from tasks.params.allocate import Allocate, dense_layers
from tasks.params.base import PARAMS
from tasks.params.imp import MODEL, Imp, folder
from tasks.params.prune import Prune
from tasks.params.quantize import Quantize
from tasks.params.sensitivity import Sensitivity
from tasks.params.surgeon import Surgeon

ROUNDING = ("sparsegpt", "magnitude_obs", "wanda_obs")  # pruning methods that can round in the same pass


def pattern_fits(prune: Prune, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """N:M agrees with the sparsity and divides every width."""
    if prune.method == "none":
        return
    try:
        pattern = make_pattern(prune.pattern, prune.sparsity, "row" if prune.scope == "auto" else prune.scope)
        if not isinstance(pattern, Structured):
            for layer, (_, width) in layers.items():
                check_width(pattern, layer, width)
        elif prune.method != "surgeon":
            yield Problem(
                f"{PARAMS}: prune.pattern",
                f"{prune.method} prunes single weights, no `{prune.pattern}`",
                "valid: unstructured, N:M; or prune.method surgeon",
            )
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


def rounding_suits_method(prune: Prune, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """The method can round as it prunes, and the groups of that grid divide every width."""
    if prune.bits is None or prune.method == "none":
        return
    if prune.method not in ROUNDING:
        able = ", ".join(ROUNDING)
        yield Problem(f"{PARAMS}: prune.bits", f"{prune.method} does not round", f"valid: null, or a method of {able}")
    if prune.columns % prune.group_size:
        yield Problem(
            f"{PARAMS}: prune.group_size",
            f"{prune.group_size} does not divide prune.columns, {prune.columns}",
            "valid: a divisor of it",
        )
    try:
        check_group_size(layers, prune.group_size, "prune.group_size")
    except Problem as problem:
        yield problem


def dense_layers_exist(allocate: Allocate, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Every pattern for dense layers matches one."""
    for pattern in allocate.dense if layers else []:
        try:
            dense_layers([pattern], layers)
        except Problem as problem:
            yield problem


def allocation_fits(allocate: Allocate, prune: Prune, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """N:M is dealt out evenly, any other pattern within bounds that leave a way to the sparsity."""
    if prune.method == "none":
        return
    try:
        structures = parse_structures(prune.pattern)
        if structures and allocate.rule not in ("uniform", "global"):
            yield Problem(
                f"{PARAMS}: allocate.rule",
                f"`{allocate.rule}` deals out single weights, no {prune.pattern}",
                "valid: uniform (the same for every layer or block), global (one threshold for all)",
            )
        if not structures and (parsed := parse_pattern(prune.pattern)):
            check_rule(allocate.rule, NofM(*parsed))
        else:
            dense = [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in allocate.dense)]
            sizes = {layer: rows * width for layer, (rows, width) in layers.items()}
            reachable_budget(sizes, prune.sparsity, allocate.low, allocate.high, dense)
    except Problem as problem:
        yield problem


def allocation_has_scores(
    allocate: Allocate, prune: Prune, sensitivity: Sensitivity, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """Sparsity is not dealt out by a column that the sensitivity stage does not fill."""
    if prune.method != "none" and allocate.rule == "pmpq" and sensitivity.method != "pmpq":
        yield Problem(
            f"{PARAMS}: allocate.rule",
            f"`pmpq` goes by the blocks' loss increase when pruned, but sensitivity.method is `{sensitivity.method}`",
            "set sensitivity.method to pmpq, or allocate.rule to uniform, owl or global",
        )


def allocation_keeps_mask(allocate: Allocate, prune: Prune, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Behind a cycle of `imp`, which drops the same share everywhere, no layer gets weights back."""
    if prune.source == MODEL or prune.method == "none":
        return
    for key, value, valid in (("rule", allocate.rule, "uniform"), ("dense", allocate.dense, [])):
        if value != valid:
            yield Problem(
                f"{PARAMS}: allocate.{key}", f"`{value}` does not keep the mask of {prune.source}", f"valid: {valid}"
            )


def cycles_grow(imp: Imp, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Each cycle starts from the model or an earlier cycle, and drops more than that one."""
    earlier = {MODEL: 0.0}
    for name, cycle in imp.cycles.items():
        if cycle.source not in earlier:
            yield Problem(
                f"{PARAMS}: imp.cycles.{name}.source",
                f"`{cycle.source}` is neither the model nor an earlier cycle",
                "valid: " + ", ".join(earlier),
            )
        elif cycle.sparsity <= earlier[cycle.source]:
            yield Problem(
                f"{PARAMS}: imp.cycles.{name}.sparsity",
                f"{cycle.sparsity} is not above the {earlier[cycle.source]} of {cycle.source}, where it starts",
                f"valid: above {earlier[cycle.source]}, below 1",
            )
        earlier[folder(name)] = cycle.sparsity


def pruning_goes_on(prune: Prune, imp: Imp, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Pruning starts from the model or a cycle of `imp`, and then keeps that cycle's mask."""
    checkpoints = imp.checkpoints()
    if prune.source not in checkpoints:
        yield Problem(
            f"{PARAMS}: prune.source",
            f"`{prune.source}` is neither the model nor a cycle of `imp`",
            "valid: " + ", ".join(checkpoints),
        )
    elif prune.source != MODEL and prune.method != "none":
        least = checkpoints[prune.source]
        # Rows and groups have counts of their own, and a cycle may have dropped more.
        for key, valid in {
            "method": ["magnitude", "none"],
            "pattern": ["unstructured"],
            "scope": ["auto", "layer"],
        }.items():
            if (value := getattr(prune, key)) not in valid:
                yield Problem(
                    f"{PARAMS}: prune.{key}",
                    f"`{value}` does not go on with the mask of {prune.source}",
                    "valid: " + ", ".join(valid),
                )
        if prune.sparsity < least:
            yield Problem(
                f"{PARAMS}: prune.sparsity",
                f"{prune.sparsity} is below the {least} of {prune.source}",
                f"valid: from {least}, below 1",
            )


def surgery_is_sound(
    prune: Prune, surgeon: Surgeon, quantize: Quantize, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """Draws that are taken are looked at, corrections lie between shots, widths that are left can be quantised."""
    if prune.method != "surgeon":
        return
    if surgeon.samples > 1 and surgeon.labels == "data":
        yield Problem(
            f"{PARAMS}: surgeon.samples",
            f"{surgeon.samples}, but a text has one next token",
            "valid: 1, or labels sampled",
        )
    if surgeon.correction_steps and surgeon.shots == 1:
        yield Problem(
            f"{PARAMS}: surgeon.correction_steps",
            f"{surgeon.correction_steps}, but corrections lie between shots, and surgeon.shots is 1",
            "valid: 0, or more shots; behind the last one comes stage retrain",
        )
    groups = quantize.group_size if quantize.method != "none" else None
    narrower = {"units", "hidden"} & set(prune.pattern.split("+"))
    if isinstance(groups, int) and narrower and surgeon.multiple % groups:
        yield Problem(
            f"{PARAMS}: surgeon.multiple",
            f"widths that are multiples of {surgeon.multiple} are not all multiples of quantize.group_size, {groups}",
            f"valid: a multiple of {groups}",
        )


RULES: list[Rule] = [
    pattern_fits,
    scope_suits_method,
    rounding_suits_method,
    dense_layers_exist,
    allocation_fits,
    allocation_has_scores,
    allocation_keeps_mask,
    cycles_grow,
    pruning_goes_on,
    surgery_is_sound,
]
