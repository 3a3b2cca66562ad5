"""Texts in the form of `<doc ...>`, a title, an article, `</doc>`: an encyclopedia's dump."""

import re

from compression.core.errors import Problem

_OPENING = re.compile(r"^<doc\b[^\n]*>$", re.MULTILINE)
_ARTICLE = re.compile(r"^<doc\b[^\n]*>\n(.*?)^</doc>", re.DOTALL | re.MULTILINE)
_SENTENCES = re.compile(r".{40,}?[.!?](?=\s|$)")  # the shortest is longer than what ends in an abbreviation's stop


def articles(document: str, where: str) -> list[str]:
    """What stands between `<doc ...>` and `</doc>`, titles included; empty ones are passed over.

    Raises:
        Problem: there are none, or one is not closed.
    """
    opened, found = len(_OPENING.findall(document)), _ARTICLE.findall(document)
    if not found and not opened:
        raise Problem(f"{where}.format", "the text has no <doc ...> lines", "plain text is `format: text`")
    if len(found) != opened:
        what = f"{opened} articles begin with <doc ...>, but {len(found)} end with </doc>"
        raise Problem(f"{where}.source", what, "the file is cut off or not in this format")
    return [stripped for article in found if (stripped := article.strip())]


def question(article: str) -> tuple[str, str] | None:
    """What its title asks for, and its first sentence; None where there is a title only."""
    title, _, text = article.partition("\n")
    first = text.strip().partition("\n")[0]
    sentence = _SENTENCES.match(first)
    return (f"What is {title}?", sentence[0] if sentence else first) if first else None
