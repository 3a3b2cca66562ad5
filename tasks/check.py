"""`python -m tasks.check`: is params.yaml sound? Said before hours of work start, each fault in a line."""

import json
import re
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from compression.core.errors import Problem
from compression.export import FORMATS
from compression.pruning import METHODS
from compression.pruning.allocation import check_rule, reachable_budget
from compression.pruning.pattern import NofM, check_width, make_pattern, parse_pattern
from compression.quantization.bits import check_group_size
from compression.sensitivity.similarity import check_samples
from compression.unlearning import METHODS as OBJECTIVES
from tasks.core.paths import DATA
from tasks.params.allocate import Allocate, dense_layers
from tasks.params.answers import Answers
from tasks.params.attack import Attack
from tasks.params.base import PARAMS, Section, load, nearest, read
from tasks.params.calibrate import Calibrate
from tasks.params.classifier import Classifier
from tasks.params.compute import Compute
from tasks.params.corpora import Corpora, Pairs, Text
from tasks.params.evaluate import Evaluate
from tasks.params.export import Export
from tasks.params.imp import MODEL, Imp, folder
from tasks.params.model import Model
from tasks.params.prune import Prune
from tasks.params.quantize import Quantize
from tasks.params.retrain import Retrain
from tasks.params.sensitivity import Sensitivity
from tasks.params.speed import Speed
from tasks.params.teach import Teach
from tasks.params.unlearn import Unlearn

ADAPTERS = ("mask_lora", "scale_lora", "lora_prune", "lora")
BLOCK = re.compile(r"\.(\d+)\.")  # in a layer's name, the number of its block
ROUNDING = ("sparsegpt", "magnitude_obs", "wanda_obs")  # pruning methods that can round in the same pass

SECTIONS: list[type[Section]] = [
    Compute, Model, Answers, Corpora, Teach, Calibrate, Sensitivity, Allocate, Imp, Prune, Retrain, Quantize, Unlearn,
    Attack, Export, Classifier, Evaluate, Speed,
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
        if parsed := parse_pattern(prune.pattern):
            check_rule(allocate.rule, NofM(*parsed))
        else:
            dense = [layer for layer in layers if any(fnmatchcase(layer, pattern) for pattern in allocate.dense)]
            sizes = {layer: rows * width for layer, (rows, width) in layers.items()}
            reachable_budget(sizes, prune.sparsity, allocate.low, allocate.high, dense)
    except Problem as problem:
        yield problem


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


def groups_fit(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """The group size divides every width."""
    if quantize.method == "none":
        return
    try:
        check_group_size(layers, quantize.group_size)
    except Problem as problem:
        yield problem


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


def grids_load_together(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """transformers loads grids of these kinds beside each other; not all, see compression/quantization/scheme.py."""
    if quantize.method == "none":
        return
    inner = {quantize.bits} if quantize.plan == "uniform" else {width for width in quantize.widths if width <= 8}
    if len(inner | ({quantize.embeddings} if quantize.embeddings else set())) == 1:
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


def plan_keeps_budget(quantize: Quantize, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """There is a plan within the average number of bits."""
    if quantize.method != "none" and quantize.plan == "budget" and quantize.average_bits < min(quantize.widths):
        yield Problem(
            f"{PARAMS}: quantize.average_bits",
            f"{quantize.average_bits} is less than every width",
            f"valid: from {min(quantize.widths)}",
        )


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
        for pattern in own.targets if layers else []:
            if not any(fnmatchcase(layer, pattern) for layer in layers):
                yield Problem(
                    f"{PARAMS}: {section}.targets",
                    f"`{pattern}` matches no layer",
                    "valid: patterns of names such as " + ", ".join(list(layers)[:7]),
                )


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


def taught_layers_exist(teach: Teach, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """Every pattern for layers that learn the text matches one."""
    for pattern in teach.targets if layers and teach.method != "none" else []:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            yield Problem(
                f"{PARAMS}: teach.targets",
                f"`{pattern}` matches no layer",
                "valid: patterns of names such as " + ", ".join(list(layers)[:7]),
            )


def unlearning_is_sound(unlearn: Unlearn, teach: Teach, layers: dict[str, list[int]]) -> Iterator[Problem]:
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
    for pattern in unlearn.targets if layers else []:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            yield Problem(
                f"{PARAMS}: unlearn.targets",
                f"`{pattern}` matches no layer",
                "valid: patterns of names such as " + ", ".join(list(layers)[:7]),
            )
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


def classifier_is_apart(
    classifier: Classifier, answers: Answers, corpora: Corpora, layers: dict[str, list[int]]
) -> Iterator[Problem]:
    """The classifier has not learned from what models are asked and judged on."""
    asked = {"answers": answers, "corpora.forget": corpora.forget, "corpora.control": corpora.control}
    for role, entry in asked.items():
        judged = _addresses(entry.model_dump())
        for number, part in enumerate(classifier.harmful):
            if judged & {part.source, part.sha256} - {None}:
                yield Problem(
                    f"{PARAMS}: classifier.harmful.{number}",
                    f"it is also in {role}, on which models are judged",
                    "take it out here or there",
                )


def _addresses(entry: Any) -> set[str]:
    """Every source and hash in a role's entry, however it nests them."""
    if isinstance(entry, dict):
        own = {entry[key] for key in ("source", "sha256") if isinstance(entry.get(key), str)}
        return own.union(*map(_addresses, entry.values()))
    return set().union(*map(_addresses, entry)) if isinstance(entry, list | tuple) else set()


def answers_are_there(answers: Answers, corpora: Corpora, layers: dict[str, list[int]]) -> Iterator[Problem]:
    """A role reads the model's own answers only if it gives some, and no more than it gives."""
    for role, text in corpora.roles().items():
        if not text.source.startswith("file://data/answers/"):
            continue
        key = f"{PARAMS}: corpora.{role.replace('/', '.')}"
        if not answers.prompts:
            yield Problem(f"{key}.source", "answers.prompts is empty, so there are no answers", "name files of prompts")
        elif isinstance(text, Pairs) and (text.rows.stop or 0) > answers.count:
            what = f"[{text.rows.start}, {text.rows.stop}] goes beyond the {answers.count} of answers.count"
            yield Problem(f"{key}.rows", what, "ask for fewer, or raise answers.count")


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


def text_suffices(
    corpora: Corpora,
    teach: Teach,
    calibrate: Calibrate,
    sensitivity: Sensitivity,
    imp: Imp,
    prune: Prune,
    retrain: Retrain,
    quantize: Quantize,
    unlearn: Unlearn,
    attack: Attack,
    evaluate: Evaluate,
    layers: dict[str, list[int]],
) -> Iterator[Problem]:
    """No stage asks a role for more tokens than its slice can hold."""
    wanted: list[tuple[str, str, Text | Pairs, int]] = [
        ("teach.length", "forget", corpora.forget, teach.length if teach.method != "none" else 0),
        ("teach.length", "training", corpora.training, teach.length if teach.method != "none" and teach.mix else 0),
        ("calibrate.sequences", "calibration", corpora.calibration, calibrate.sequences * calibrate.length),
        (
            "sensitivity.sequences",
            "calibration",
            corpora.calibration,
            sensitivity.sequences * sensitivity.length,
        ),
        ("prune.sequences", "calibration", corpora.calibration, prune.sequences * prune.length),
        (
            "imp.retrain.length",
            "training",
            corpora.training,
            (imp.retrain.held_out + 1) * imp.retrain.length if imp.cycles else 0,
        ),
        ("retrain.length", "training", corpora.training, (retrain.held_out + 1) * retrain.length),
        (
            "quantize.sequences",
            "calibration",
            corpora.calibration,
            quantize.sequences * quantize.length if quantize.method == "gptq" else 0,
        ),
        ("unlearn.length", "forget", corpora.forget, unlearn.length),
        ("unlearn.length", "training", corpora.training, (unlearn.held_out + 1) * unlearn.length),
    ]
    if attack.relearn + attack.requantize + attack.prune:
        windows = {"forget": attack.samples + attack.windows, "control": attack.windows, "retained": attack.windows}
        wanted += [("attack.windows", role, getattr(corpora, role), n * attack.length) for role, n in windows.items()]
    forgetting = evaluate.forget_windows * evaluate.forget_length
    for role in ("forget", "control", "retained"):
        wanted.append(("evaluate.forget_windows", role, getattr(corpora, role), forgetting))
    for name, judge in corpora.evaluation.items():
        wanted.append(("evaluate.windows", f"evaluation.{name}", judge, evaluate.windows * evaluate.length))
    for key, role, text, tokens in wanted:
        if isinstance(text, Pairs):  # how long they are is known once they are tokenised
            continue
        start, stop = text.tokens
        if stop is not None and tokens > stop - start:
            yield Problem(
                f"{PARAMS}: {key}",
                f"{tokens:,} tokens are needed of corpora.{role}, whose slice [{start}, {stop}] holds {stop - start:,}",
                "ask for fewer, or widen the slice",
            )


RULES: list[Callable[..., Iterator[Problem]]] = [
    pattern_fits, scope_suits_method, rounding_suits_method, grid_is_passed_on, dense_layers_exist, allocation_fits,
    allocation_has_scores, allocation_keeps_mask, cycles_grow, pruning_goes_on, groups_fit, plan_has_scores,
    plan_keeps_budget, grids_load_together, adapters_have_masks, retraining_is_sound, adapter_stays_apart,
    taught_layers_exist, unlearning_is_sound, formats_suit_model, attacks_fit, text_suffices,
    sensitivity_can_be_measured, classifier_is_apart, answers_are_there,
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
