"""Which widths transformers builds: it is asked, with the config changed and without weights.

So nothing has to be known of a family: one that ties the width of a head to the hidden width, or has a norm as wide as
all heads together, builds other shapes than those that are wanted, and is found out.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from compression.core.errors import Problem
from compression.core.skeleton import empty_model

Shapes = dict[str, tuple[int, ...]]  # by tensor

UNITS = ("intermediate_size", "ffn_dim", "n_inner")  # what configs call the number of hidden units


def read_config(folder: Path) -> Any:
    """config.json as transformers reads it, with what the family has by default."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def said(config: Any, key: str) -> Any:
    """A value of the config; None if it has none.

    Raises:
        Problem: blocks have values of their own.
    """
    try:
        return getattr(config, key, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError, which transformers keeps to itself
        raise Problem("config.json", f"per_layer_config gives blocks a `{key}` each", "valid: one for all") from None


def heads(config: Any) -> int:
    """Of queries.

    Raises:
        Problem: the config does not say.
    """
    if not isinstance(number := said(config, "num_attention_heads"), int):
        raise Problem("config.json", "does not say how many heads a block has", "known: num_attention_heads")
    return number


def head_width(config: Any) -> int:
    return int(said(config, "head_dim") or config.hidden_size // heads(config))


def key_value_heads(config: Any) -> int:
    """As many as there are heads where they are not shared."""
    return int(said(config, "num_key_value_heads") or heads(config))


def with_units(config: Any, before: int, after: int) -> dict[str, Any]:
    """What changes in config.json if each block has `after` hidden units in place of `before`.

    Raises:
        Problem: the config does not say how many there are.
    """
    for key in UNITS:
        if hasattr(config, key) and said(config, key) in (before, None):  # n_inner is None where it is the usual width
            return {key: after}
    raise Problem("config.json", f"does not say that a block has {before} hidden units", f"known: {', '.join(UNITS)}")


def with_groups(config: Any, after: int) -> dict[str, Any]:
    """What changes in config.json if each block has `after` key/value heads; to each belong as many heads as before."""
    shared = heads(config) // key_value_heads(config)
    changes: dict[str, Any] = {"num_attention_heads": after * shared, "head_dim": head_width(config)}
    return changes | ({"num_key_value_heads": after} if hasattr(config, "num_key_value_heads") else {})


def is_taken(config: Any, changes: Mapping[str, Any]) -> bool:
    """Whether transformers takes a config; that of a Llama has to have a hidden width that the heads divide."""
    try:
        type(config).from_dict(config.to_dict() | dict(changes))
    except (StrictDataclassError, ValueError):
        return False
    return True


def built(settings: Mapping[str, Any]) -> Shapes:
    """Shapes of all tensors of the model that transformers builds of a config.json."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(dict(settings)), encoding="utf-8")
        return {name: tuple(tensor.shape) for name, tensor in empty_model(Path(scratch)).state_dict().items()}
