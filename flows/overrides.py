"""`--set key=value`: checks the key, reads the value as YAML, writes both as `dvc exp run -S` takes them."""

import json
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.errors import Problem, nearest

KEY = re.compile(r"^[A-Za-z0-9_.]+$")


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
    """Arguments of `dvc exp run`, in the grammar of Hydra, where a bare comma would mean a sweep."""
    return [word for key, value in overrides.items() for word in ("-S", f"{key}={hydra(value)}")]


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
