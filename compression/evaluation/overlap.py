"""ROUGE-L: how much of a reference stands in a text, in the same order (Lin 2004).

    LCS         length of the longest common subsequence of words
    recall      LCS / words of the reference
    precision   LCS / words of the text
    F1          2 recall precision / (recall + precision)

Words are runs of letters and digits in lower case; endings stay on.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

WORD = re.compile(r"\w+")


class RougeL(NamedTuple):
    """Shares from 0 to 1."""

    recall: float
    precision: float
    f1: float


def rouge_l(text: str, reference: str) -> RougeL:
    """All three are 0 where one of the two has no word."""
    said, wanted = WORD.findall(text.lower()), WORD.findall(reference.lower())
    common = longest_common_subsequence(said, wanted)
    if not common:
        return RougeL(0.0, 0.0, 0.0)
    recall, precision = common / len(wanted), common / len(said)
    return RougeL(recall, precision, 2 * recall * precision / (recall + precision))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length; time goes with the product of the two lengths."""
    row = [0] * (len(second) + 1)
    for word in first:
        before, row = row, [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if word == other else max(before[place + 1], row[-1]))
    return row[-1]
