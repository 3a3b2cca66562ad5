"""Roles of stage `corpus` that judge share nothing with those that are learned from."""

from typing import Any

import numpy as np

from compression.core.errors import Problem
from tasks.pairs import Row
from tasks.params.corpora import Pairs, Text, dotted, key

# A role that judges, and the roles it may share no token with: what was learned from cannot judge.
APART = {
    "evaluation": ("calibration", "training", "forget", "neighbours"),
    "retained": ("training", "forget", "neighbours"),
    "control": ("forget", "neighbours"),
}
BY_SENTENCES = {"articles", "articles_as_questions"}  # two forms of one text, which are compared by what they say


def refuse_overlaps(roles: dict[str, Text | Pairs]) -> None:
    """Keeps the texts that judge apart from those that are learned from, as `APART` says.

    Two texts are the same when their sources or their hashes are.

    Raises:
        Problem: two roles share tokens or rows, or might: counts of different formats cannot be compared.
    """
    for judge, text in roles.items():
        for other in APART.get(judge.partition("/")[0], ()):
            learned = roles.get(other)
            if learned is None:
                continue
            same_hash = text.sha256 is not None and text.sha256 == learned.sha256
            if text.source != learned.source and not same_hash:
                continue
            if {text.format, learned.format} == BY_SENTENCES:
                continue
            hint = f"give {dotted(judge)} other {text.unit} than {dotted(other)}, or another text"
            if text.format != learned.format:
                what = f"the same text as corpora.{dotted(other)}, in another format, so they may overlap"
                raise Problem(key(judge, "format"), what, hint)
            start = max(text.slice.start, learned.slice.start)
            stops = [stop for stop in (text.slice.stop, learned.slice.stop) if stop is not None]
            if not stops or start < min(stops):
                shared = f"{start} to {min(stops) if stops else 'the end'}"
                what = f"{text.unit} {shared} are also in corpora.{dotted(other)}, and would flatter the result"
                raise Problem(key(judge, text.unit), what, hint)


def refuse_shared_sentences(
    parts: dict[str, np.ndarray | list[Row]], roles: dict[str, Text | Pairs], tokenizer: Any
) -> None:
    """The same for an encyclopedia's articles and the questions that its titles ask, by the answers' sentences.

    Raises:
        Problem: an answer of the one role stands in the text of the other.
    """
    for judge, text in roles.items():
        for other in APART.get(judge.partition("/")[0], ()):
            if other not in roles or {text.format, roles[other].format} != BY_SENTENCES:
                continue
            asked, read = (judge, other) if isinstance(text, Pairs) else (other, judge)
            whole = tokenizer.decode(parts[read])
            shared = sum(answer in whole for row in parts[asked] for answer in row.safe)
            if shared:
                what = f"{shared} answers of corpora.{dotted(asked)} stand in corpora.{dotted(read)}"
                hint = f"other rows for {dotted(asked)}: those of articles behind the tokens of {dotted(read)}"
                raise Problem(key(judge, text.unit), f"{what}, and would flatter the result", hint)
