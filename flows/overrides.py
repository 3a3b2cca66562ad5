"""`--set key=value` and `--params FILE`: checks the keys, reads values as YAML, writes both as `dvc exp run -S` takes
them."""

import json
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.errors import Problem, nearest

KEY = re.compile(r"^[A-Za-z0-9_.]+$")


def read(params: Path, file: Path | None, pairs: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """params.yaml, and by dotted key what `file` and, over it, `pairs` would change of it.

    Raises:
        Problem: a file that is missing or no mapping; whatever `overlay` and `parse` raise.
    """
    document = load(params)
    laid_over = overlay(load(file), document, file.name) if file else {}
    return document, laid_over | parse(pairs, document)


def overlay(changes: dict[str, Any], params: dict[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key of a document with some keys of params in it, mapping by mapping.

    A mapping is taken as it is where the one in params is empty, such as `imp.cycles`, or where it names its `format`,
    on which hangs what other keys there are.

    Raises:
        Problem: a key that params does not have, or not where it is; `where` names the file.
    """
    found: dict[str, Any] = {}
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if key not in params:
            known = [f"{prefix}{other}" for other in params]
            raise Problem(f"{where}: params.yaml has no key `{name}`; {nearest(name, known)}")
        if isinstance(value, dict) and isinstance(params[key], dict) and params[key] and "format" not in value:
            found |= overlay(value, params[key], where, f"{name}.")
        elif isinstance(params[key], dict) and not isinstance(value, dict):
            raise Problem(f"{where}: `{name}` is a section of params.yaml, not one value")
        else:
            found[name] = value
    return found


def parse(pairs: list[str], params: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key.

    Raises:
        Problem: not `key=value`, a key that params does not have, or a value that is no YAML.
    """
    found = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not KEY.match(key):
            raise Problem(f"--set takes key=value, as in `prune.sparsity=0.6`, not `{pair}`")
        keys = dotted(params)
        if key not in keys:
            raise Problem(f"params.yaml has no key `{key}`; {nearest(key, keys)}")
        found[key] = read_value(key, text)
    return found


def read_value(key: str, text: str) -> Any:
    """YAML 1.2, as DVC reads params.yaml: 1e-4 is a number, 2:4 and no are words."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        raise Problem(f"--set {key}: `{text}` is not valid YAML") from None


def dotted(params: dict[str, Any], prefix: str = "") -> list[str]:
    """All keys of nested mappings, sections included, joined with dots."""
    keys = []
    for key, value in params.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys.extend(dotted(value, f"{prefix}{key}."))
    return keys


def replaced(params: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """A copy of params with the overrides in it."""
    result: dict[str, Any] = json.loads(json.dumps(params))
    for key, value in overrides.items():
        *sections, last = key.split(".")
        place = result
        for section in sections:
            place = place[section]
        place[last] = value
    return result


def arguments(overrides: dict[str, Any]) -> list[str]:
    """Arguments of `dvc exp run`, in the grammar of Hydra, where a bare comma would mean a sweep.

    A mapping takes the place of the one before it: `~` drops that one, with which it would be merged, and `++` lets in
    keys that params.yaml does not have.
    """
    words = []
    for key, value in overrides.items():
        whole = isinstance(value, dict)
        words += ["-S", f"~{key}", "-S", f"++{key}={hydra(value)}"] if whole else ["-S", f"{key}={hydra(value)}"]
    return words


def hydra(value: Any) -> str:
    """A value in Hydra's override grammar; words are quoted, so that nothing in them is grammar."""
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, list):
        return "[" + ",".join(map(hydra, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(item)}" for key, item in value.items()) + "}"
    text = str(value)
    if re.search(r"\\|\$\{|[\x00-\x1f]", text):
        raise Problem(f"--set cannot take `{text}`: backslash, control characters and ${{ mean something else to DVC")
    return "'" + text.replace("'", "\\'") + "'"


def load(path: Path) -> dict[str, Any]:
    """params.yaml as a mapping.

    Raises:
        Problem: missing, or not a YAML mapping.
    """
    try:
        document = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise Problem(f"{path.name}: {error}") from None
    if not isinstance(document, dict):
        raise Problem(f"{path.name}: not a mapping of sections")
    return document
