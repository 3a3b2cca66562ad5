"""The figures as numbers: metrics.json for `dvc metrics`, and a tidy table for each plot."""

from math import prod
from typing import Any

import pandas as pd

from tasks.reporting.harm import harm_table
from tasks.reporting.inputs import Kernels, Row, Run, Speed

KEPT = {
    "perplexity", "parameters", "sparsity", "revived_weights", "bytes", "bits_per_weight", "forget", "retain",
    "memorisation", "membership", "answers",
}  # fmt: skip
OF_HARM = {"answers", "rate", "failed"}
FORGETTING = ("probability", "exact_memorisation", "extraction_strength", "rouge_l_recall")
OF_KERNELS = {"layers", "weight_bytes", "logits_error"}


def metrics(run: Run) -> dict[str, Any]:
    """Nested numbers by checkpoint; a missing number leaves its key out."""
    return {name: _known(_figures(row) | {"removed": removed(row, run["dense"])}) for name, row in run.items()}


def tables(run: Run, layers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The plots' tables by file name.

    Args:
        layers: what `read_sensitivity` gives. A block's figures are the plain means over its layers, by which the
            stage `quantize` ranks the blocks, too.
    """
    return {
        "layer_sparsity": layer_sparsity(run),
        "sensitivity": layers.groupby(["block", "measure"], as_index=False)[["sensitivity", "outlier_ratio"]].mean(),
        "perplexity_bytes": perplexity_bytes(run),
        "losses": losses(run),
        "forgetting": forgetting(run),
        "memorisation": memorisation(run),
        "harm": harm_table(run),
        "pruning_costs": pruning_costs(run),
    }


def cut(row: Row, dense: Row) -> float:
    """Share of the dense model's weights, in the linears of its blocks, that were cut out: they are not stored."""
    return 1 - row.figures.prunable_parameters / dense.figures.prunable_parameters


def removed(row: Row, dense: Row) -> float:
    """Share of the dense model's weights, in the linears of its blocks, that are gone: masked or cut out."""
    gone = cut(row, dense)
    return gone + (1 - gone) * row.figures.sparsity


def layer_sparsity(run: Run) -> pd.DataFrame:
    """A row per layer of every checkpoint that has a mask: the share of the dense layer that is masked or cut out."""
    found = [
        (layer, block_of(layer), name, gone + (1 - gone) * share)
        for name, row in run.items()
        for layer, share in row.figures.layer_sparsity.items()
        for gone in [_layer_cut(layer, row, run["dense"])]
    ]
    return pd.DataFrame(found, columns=["layer", "block", "checkpoint", "sparsity"])


def _layer_cut(layer: str, row: Row, dense: Row) -> float:
    shapes = [one.manifest.layers.get(layer) for one in (row, dense)]
    now, before = [prod(shape) if shape else None for shape in shapes]
    return 1 - now / before if now and before else 0.0


def pruning_costs(run: Run) -> pd.DataFrame:
    """A row per layer whose loss increase was predicted when it was pruned, in nats a token."""
    found = [(layer, block_of(layer), cost) for layer, cost in run["pruned"].manifest.costs.items()]
    return pd.DataFrame(found, columns=["layer", "block", "cost"])


def perplexity_bytes(run: Run) -> pd.DataFrame:
    """A row per checkpoint and text whose perplexity is known."""
    found = [
        (name, text, value, row.figures.bytes)
        for name, row in run.items()
        for text, value in row.figures.perplexity.items()
        if value is not None
    ]
    return pd.DataFrame(found, columns=["checkpoint", "text", "perplexity", "bytes"])


def losses(run: Run) -> pd.DataFrame:
    """A row per step of every loss curve."""
    found = [
        (row.manifest.stage, curve, step, loss)
        for row in run.values()
        if row.manifest.training
        for curve, values in row.manifest.training.curves.items()
        for step, loss in enumerate(values, 1)
    ]
    return pd.DataFrame(found, columns=["stage", "curve", "step", "loss"])


def forgetting(run: Run) -> pd.DataFrame:
    """A row per checkpoint, figure of FORGETTING and role, where it is known."""
    found = [
        (name, figure, role, value)
        for name, row in run.items()
        for figure in FORGETTING
        for role in ("forget", "control")
        if (value := known(row, role, figure)) is not None
    ]
    return pd.DataFrame(found, columns=["checkpoint", "figure", "role", "value"])


def memorisation(run: Run) -> pd.DataFrame:
    """A row per checkpoint: exact memorisation, a column a role, as `dvc plots` draws it."""
    found = [
        (name, *(known(row, role, "exact_memorisation") for role in ("forget", "control"))) for name, row in run.items()
    ]
    return pd.DataFrame(found, columns=["checkpoint", "forget", "control"])


def known(row: Row, role: str, figure: str) -> float | None:
    """How much of a role's text a checkpoint knows, by one of FORGETTING; None where it was not asked."""
    told = row.figures.answers.get(role) if figure == "rouge_l_recall" else row.figures.memorisation.get(role)
    value: float | None = getattr(told, figure) if told else None
    return value


def answer_share(row: Row, figure: str, *roles: str) -> float | None:
    """Share of the answers to the prompts of these roles (all, if none is named); None where nothing was asked."""
    told = [answers for role, answers in row.figures.answers.items() if not roles or role in roles]
    asked = sum(answers.prompts for answers in told)
    return sum(getattr(answers, figure) * answers.prompts for answers in told) / asked if asked else None


def privacy_leakage(row: Row, reference: Row, score: str) -> float | None:
    """PrivLeak in percent of the reference, which never saw the text (MUSE, Shi et al. 2024, arXiv 2407.06460).

    100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref): zero is best; below it the text can still be told to have been
    seen, above it the model shuns it.
    """
    own, never = row.figures.membership.get(score), reference.figures.membership.get(score)
    return None if own is None or never is None or never == 1 else 100 * (never - own) / (1 - never)


def in_block(layer: str) -> bool:
    """Whether the layer is in a block at all; the embedding is not."""
    return any(part.isdecimal() for part in layer.split("."))


def block_of(layer: str) -> int:
    """The block's number: the first part of the dotted name that is one."""
    return next(int(part) for part in layer.split(".") if part.isdecimal())


def _figures(row: Row) -> dict[str, Any]:
    speed, kernels = row.speed, row.speed.kernels
    coded = {"tokens_per_second": _rates(kernels)} | kernels.model_dump(include=OF_KERNELS) if kernels else {}
    return (
        row.figures.model_dump(include=KEPT)
        | {"harm": {role: own.model_dump(include=OF_HARM) for role, own in row.figures.harm.items()}}
        | {"tokens_per_second": _rates(speed), "kernels": coded}
        | speed.model_dump(include={"load_seconds", "weight_bytes", "peak_memory_bytes"})
    )


def _rates(speed: Speed | Kernels) -> dict[str, float]:
    return {"prefill": speed.prefill_tokens_per_second, "decode": speed.decode_tokens_per_second}


def _known(figures: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _known(one) if isinstance(one, dict) else one for key, one in figures.items()}
    return {key: one for key, one in kept.items() if one is not None and one != {}}
