"""Which sets of weights may stay: patterns, as they are written in params.yaml."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from compression.core.errors import Problem

Scope = Literal["row", "layer", "columns", "adaptive"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go.

    Attributes:
        sparsity: share of the layer's weights that go; their number is exact.
        scope: among which weights the lowest are sought. `row`: the same share in every output row; `layer`: one
            ranking for all; `columns`: within each block of columns (only by methods that go by columns);
            `adaptive`: each row drops the same share of its summed scores (Wanda's variant, arXiv 2306.11695).
    """

    sparsity: float
    scope: Scope = "row"


@dataclass(frozen=True)
class NofM:
    """At most `keep` of every `of` consecutive inputs of a row stay."""

    keep: int
    of: int

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of


@dataclass(frozen=True)
class Structured:
    """Whole structures go.

    Attributes:
        sparsity: share of the weights that go with them.
        kinds: `rows` and `columns` of a linear, or what several linears share: the hidden `units` of an MLP, the
            `heads` of an attention with their keys and values, the dimensions of the `hidden` states.
    """

    sparsity: float
    kinds: frozenset[str]

    @property
    def coupled(self) -> bool:
        return bool(self.kinds & COUPLED)


Pattern = Unstructured | NofM
LINES = frozenset({"rows", "columns"})
COUPLED = frozenset({"units", "heads"})
STREAM = frozenset({"hidden"})


def parse_pattern(text: str) -> tuple[int, int] | None:
    """`unstructured` -> None; `2:4` -> (2, 4).

    Raises:
        ValueError: neither of the two, or N not in 1..M-1.
    """
    if text == "unstructured":
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(
            "valid: unstructured; N:M with 0 < N < M, such as 2:4, 4:8 or 1:4; with method surgeon rows, columns, "
            "rows+columns, units, heads, units+heads or hidden as well"
        )
    return int(found[1]), int(found[2])


def parse_structures(text: str) -> frozenset[str] | None:
    """`rows+columns`, `units+heads`, one of the four or `hidden` -> its kinds; None if it is another pattern.

    Raises:
        ValueError: a word that is no structure, beside others that are, or kinds that do not go together.
    """
    kinds = frozenset(text.split("+"))
    if not kinds & (LINES | COUPLED | STREAM):
        return None
    if not any(kinds <= together for together in (LINES, COUPLED, STREAM)):
        raise ValueError("valid: rows, columns, rows+columns, units, heads, units+heads, hidden")
    return kinds


def make_pattern(text: str, sparsity: float, scope: Scope) -> Pattern | Structured:
    """The pattern of weights that params.yaml describes.

    Raises:
        Problem: N:M contradicts the sparsity.
    """
    if kinds := parse_structures(text):
        return Structured(sparsity, kinds)
    parsed = parse_pattern(text)
    if parsed is None:
        return Unstructured(sparsity, scope)
    pattern = NofM(*parsed)
    if abs(pattern.sparsity - sparsity) > 1e-9:
        raise Problem(
            "params.yaml: prune.sparsity",
            f"{sparsity} contradicts the pattern {text}",
            f"{text} means a sparsity of {pattern.sparsity:g}",
        )
    return pattern


def check_width(pattern: Pattern, layer: str, width: int) -> None:
    """Raises Problem when `of` does not divide the layer's number of inputs."""
    if isinstance(pattern, NofM) and width % pattern.of:
        raise Problem(
            layer,
            f"{width} inputs cannot be divided into groups of {pattern.of} ({pattern.keep}:{pattern.of})",
        )
