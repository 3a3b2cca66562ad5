"""Rules on bits: sections `sensitivity`, `quantize` and `export`."""

import json
from collections.abc import Iterator
from importlib import import_module

from compression.core.errors import Problem
from compression.export import FORMATS
from compression.quantization.bits import check_group_size, check_packable
from compression.sensitivity.similarity import check_samples
from tasks.checks.pruning import ROUNDING
from tasks.checks.rule import Rule
from tasks.core.paths import DATA
from tasks.params.base import PARAMS
from tasks.params.export import Export
from tasks.params.imp import MODEL
from tasks.params.prune import Prune
from tasks.params.quantize import Quantize
from tasks.params.retrain import Retrain
from tasks.params.sensitivity import Sensitivity


def sensitivity_can_be_measured(sensitivity: Sensitivity, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Groups divide every width, and there are sequences enough for the components."""
    try:
        if sensitivity.method in ("tdmpq", "measured"):
            check_group_size(layers, sensitivity.group_size, "sensitivity.group_size")
        if sensitivity.method == "cmpq" and sensitivity.similarity != "cka":
            narrowest = min((rows for rows, _ in layers.values()), default=sensitivity.components)
            check_samples(sensitivity.sequences, min(sensitivity.components, narrowest))
    except Problem as problem:
        yield problem


def grid_is_passed_on(
    prune: Prune, retrain: Retrain, quantize: Quantize, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """Method `given` finds a grid, just as pruning has left it."""
    if quantize.method != "given":
        return
    if prune.bits is None or prune.method not in ROUNDING:
        yield Problem(
            f"{PARAMS}: quantize.method", "`given` is the grid of prune.bits, but there is none", "valid: rtn, gptq"
        )
        return
    for key, value, valid in (
        ("retrain.method", retrain.method, ("none", "subset")),  # any other moves weights off the grid
        ("quantize.plan", quantize.plan, ("uniform",)),
        ("quantize.bits", quantize.bits, (prune.bits,)),
        ("quantize.group_size", quantize.group_size, (prune.group_size,)),
        ("quantize.symmetric", quantize.symmetric, (True,)),
    ):
        if value not in valid:
            listed = ", ".join(map(str, valid))
            yield Problem(f"{PARAMS}: {key}", f"{value} does not keep the grid of prune.bits", f"valid: {listed}")


def layers_can_be_packed(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """transformers loads what the stage would write."""
    if quantize.method == "none":
        return
    manifest = DATA / "model" / "manifest.json"
    transposed = json.loads(manifest.read_text(encoding="utf-8")).get("transposed", ()) if manifest.exists() else ()
    try:
        check_packable(layers, transposed)
    except Problem as problem:
        yield problem


def groups_fit(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """The group size divides every width."""
    if quantize.method == "none":
        return
    try:
        check_group_size(layers, quantize.group_size)
    except Problem as problem:
        yield problem


def groups_fit_heads(prune: Prune, quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Groups fill the inputs of the layers behind an attention however many heads are left."""
    asked = prune.method == "surgeon" and "heads" in prune.pattern.split("+") and quantize.method != "none"
    folder = DATA / "model"
    if not (asked and layers and isinstance(quantize.group_size, int) and (folder / "config.json").exists()):
        return
    widths = import_module("compression.surgeon.widths")  # with transformers, for which other runs need not wait
    try:
        config = widths.read_config(folder)
        group = widths.heads(config) // widths.key_value_heads(config) * widths.head_width(config)
    except Problem as problem:
        yield problem
        return
    if group % quantize.group_size:
        yield Problem(
            f"{PARAMS}: quantize.group_size",
            f"{quantize.group_size} does not divide the {group} outputs of a key/value head's queries, so it may not "
            "divide what prune.pattern leaves of an attention",
            f"valid: a divisor of {group}; row, tensor; or a pattern without heads",
        )


def plan_has_scores(quantize: Quantize, sensitivity: Sensitivity, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Bits are not dealt out by a column, or at a width, that the sensitivity stage does not fill."""
    if not quantize.ranks:
        return
    if quantize.by not in ("outlier_ratio", sensitivity.method):
        yield Problem(
            f"{PARAMS}: quantize.by",
            f"`{quantize.by}` is not in the sensitivity table, since sensitivity.method is `{sensitivity.method}`",
            f"set sensitivity.method to {quantize.by}, or quantize.plan to uniform",
        )
    costed = quantize.by in ("tdmpq", "measured")
    if quantize.plan == "ceiling" and not costed:
        yield Problem(
            f"{PARAMS}: quantize.by", f"`{quantize.by}` does not say how far the loss rises", "valid: tdmpq, measured"
        )
    if quantize.plan == "ceiling" and costed and sensitivity.around is not None:
        yield Problem(
            f"{PARAMS}: quantize.plan",
            f"costs around a model of {sensitivity.around} bits do not say how far the loss rises above the dense",
            "set sensitivity.around to null, or quantize.plan to budget",
        )
    missing = [width for width in quantize.widths if width <= 8 and width not in sensitivity.widths]
    if quantize.plan in ("budget", "ceiling") and costed and missing:
        listed = ", ".join(map(str, sensitivity.widths))
        yield Problem(
            f"{PARAMS}: quantize.widths",
            f"the cost of {missing[0]} bits is not measured",
            f"valid: those of sensitivity.widths, {listed}; and 16",
        )


def plan_keeps_budget(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """There is a plan within the average number of bits."""
    if quantize.method != "none" and quantize.plan == "budget" and quantize.average_bits < min(quantize.widths):
        yield Problem(
            f"{PARAMS}: quantize.average_bits",
            f"{quantize.average_bits} is less than every width",
            f"valid: from {min(quantize.widths)}",
        )


def grids_load_together(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """transformers loads grids of these kinds beside each other; not all, see compression/quantization/scheme.py."""
    if quantize.method == "none":
        return
    if len(_widths(quantize) | ({quantize.embeddings} if quantize.embeddings else set())) == 1:
        return
    if quantize.embeddings not in (None, 8):
        yield Problem(
            f"{PARAMS}: quantize.embeddings",
            f"transformers does not load an embedding of {quantize.embeddings} bits beside layers of others",
            "valid: null, 8; or plan uniform with quantize.bits the same",
        )
    if quantize.group_size == "row" and not quantize.symmetric:
        yield Problem(
            f"{PARAMS}: quantize.symmetric",
            "transformers does not load asymmetric rows of several widths",
            "valid: true; or quantize.group_size a number",
        )


def scales_can_learn(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Something is rounded where scales are to be tuned."""
    if quantize.tune.steps and (quantize.method == "none" or not _widths(quantize)):
        yield Problem(
            f"{PARAMS}: quantize.tune.steps",
            f"{quantize.tune.steps} steps are to tune scales, but no layer is rounded",
            "valid: 0; or a quantize.method, and a width below 16",
        )


def formats_suit_model(
    export: Export, prune: Prune, retrain: Retrain, quantize: Quantize, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """Each format is for such a model, on such a grid, and there is no adapter that it has no place for."""
    if "gguf" in export.formats and retrain.method == "lora" and export.source != "pruned":
        yield Problem(
            f"{PARAMS}: export.source",
            f"`{export.source}` has the adapter of retrain.method lora beside its weights",
            "valid: pruned; or a retrain.method that merges, such as mask_lora",
        )
    if "compact" in export.formats and prune.method == "none" and prune.source == MODEL:
        yield Problem(
            f"{PARAMS}: export.formats",
            "compact leaves pruned weights out, but prune.method is `none`",
            "set prune.method to another, or leave compact out",
        )
    rounded = quantize.method != "none" and export.source in ("quantized", "unlearned")
    if "gguf" in export.formats and rounded and isinstance(quantize.group_size, int) and quantize.group_size % 32:
        yield Problem(
            f"{PARAMS}: export.formats",
            f"gguf has blocks of 32 inputs, which quantize.group_size, {quantize.group_size}, does not fill",
            "set quantize.group_size to a multiple of 32, or leave gguf out",
        )
    config = DATA / "model" / "config.json"
    if "gguf" in export.formats and layers and config.exists():
        try:
            architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures")
            import_module(FORMATS["gguf"]).supported(str(config), architectures)
        except Problem as problem:
            yield problem


def _widths(quantize: Quantize) -> set[int]:
    """Bits that layers in the blocks may be rounded to."""
    return {quantize.bits} if quantize.plan == "uniform" else {width for width in quantize.widths if width <= 8}


RULES: list[Rule] = [
    sensitivity_can_be_measured,
    grid_is_passed_on,
    layers_can_be_packed,
    groups_fit,
    groups_fit_heads,
    plan_has_scores,
    plan_keeps_budget,
    grids_load_together,
    scales_can_learn,
    formats_suit_model,
]
