"""Stage `report`: what the compression cost and what it bought, as a page, metrics and a model card.

Reads the evaluations, the speeds, the sensitivity table and the checkpoints' manifests, never a tensor.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jinja2
import pandas as pd
from markupsafe import Markup
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from compression.core.errors import Problem
from tasks import plots
from tasks.core.entry import run_stage

# checkpoint -> (its folder under data/, the stage that writes it), in the order of the stages
CHECKPOINTS = {
    "dense": ("model", "download"),
    "pruned": ("pruned", "prune"),
    "retrained": ("retrained", "retrain"),
    "quantized": ("quantized", "quantize"),
    "unlearned": ("unlearned", "unlearn"),
}
FINAL = "unlearned"
DASH = "–"

SAME_BYTES = 0.02  # two sizes closer than this share are told as the same
RETAIN_RISE = 0.05  # rise of the retained text's loss, as a share, from which on the page says so
METHODS = {
    "magnitude": "magnitude pruning",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "mask_lora": "masked LoRA",
    "subset": "training a few parameters",
    "rtn": "rounding to nearest",
    "gptq": "GPTQ",
    "gradient_ascent": "gradient ascent",
}


def _known(value: Any) -> Any:
    """NaN and the infinities are no numbers to report: they count as missing."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_known)]
Count = Annotated[int | None, BeforeValidator(_known)]


class Record(BaseModel):
    """A JSON file that another stage wrote; keys that the report does not read may come along."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Forget(Record):
    """Losses in nats a token: on the text to forget, and on one like it that was never unlearned."""

    loss: Number
    control_loss: Number = None
    tokens: Count = None


class Retain(Record):
    """Loss in nats a token on text that unlearning should leave alone."""

    loss: Number
    tokens: Count = None


class Evaluation(Record):
    """data/evaluation/X.json. Sizes in bytes, shares from 0 to 1."""

    checkpoint: str
    perplexity: dict[str, Number]
    sparsity: Number
    zeros: Number = None
    revived_weights: Count
    parameters: Count = None
    prunable_parameters: Count = None
    bytes: Count
    mask_bytes: Count = None
    bits_per_weight: Number
    forget: Forget
    retain: Retain
    layer_sparsity: dict[str, Number]


class Speed(Record):
    """data/speed/X.json."""

    checkpoint: str
    device: str
    dtype: str
    load_seconds: Number
    prefill_tokens_per_second: Number
    decode_tokens_per_second: Number
    peak_memory_bytes: Count


@dataclass(frozen=True)
class Row:
    """All that is known of one checkpoint; the manifest is a dictionary of which no key is certain."""

    name: str
    figures: Evaluation
    speed: Speed
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Note:
    """A sentence for the reader; an alarm stands in red above everything else."""

    text: str
    alarm: bool = False


def main() -> None:
    """Writes data/report of the repository that is the working directory."""
    build_report(Path(), Path("data/report"))


def build_report(root: Path, out: Path) -> None:
    """Writes metrics.json, plots/*.csv, index.html and README.md into `out`, all of them or none.

    Args:
        root: the repository's root; inputs are read from its data/ folder.
        out: the folder to write, replaced when it exists.

    Raises:
        Problem: an input is missing or malformed.
    """
    rows = [_read_row(root, name) for name in CHECKPOINTS]
    layers = _read_sensitivity(root)
    extra = _read_manifest(root, "sensitivity", "sensitivity", required=False)
    tables = {
        "layer_sparsity": layer_sparsity(rows),
        "sensitivity": block_sensitivity(layers),
        "perplexity_bytes": perplexity_bytes(rows),
    }
    page = _page(rows, extra, tables)

    folder = out.with_name(f".{out.name}-{os.getpid()}")
    old = out.with_name(f".{out.name}-{os.getpid()}-old")
    try:
        (folder / "plots").mkdir(parents=True)
        text = json.dumps(metrics(rows), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        _write(folder / "metrics.json", text)
        for name, table in tables.items():
            _write(folder / "plots" / f"{name}.csv", table.to_csv(index=False, float_format="%.8g"))
        _write(folder / "index.html", _render("report.html.j2", page))
        _write(folder / "README.md", _render("card.md.j2", page))
        if out.exists():
            out.rename(old)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def metrics(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures as nested numbers for `dvc metrics`; a missing number leaves its key out."""
    return {row.name: _without_missing(_figures(row)) for row in rows}


def layer_sparsity(rows: Sequence[Row]) -> pd.DataFrame:
    """A row per layer of every checkpoint that has a mask; layers outside the blocks have no `block`."""
    found = [
        (layer, _block(layer), row.name, share)
        for row in rows
        for layer, share in row.figures.layer_sparsity.items()
        if share is not None
    ]
    table = pd.DataFrame(found, columns=["layer", "block", "checkpoint", "sparsity"])
    return table.astype({"block": "Int64", "sparsity": float})


def block_sensitivity(layers: pd.DataFrame) -> pd.DataFrame:
    """A row per block: means over its layers, weighted by their parameters; missing values do not count."""
    found = []
    for block, group in layers.groupby("block", sort=True):
        found.append((block, *(_mean(group[column], group["parameters"]) for column in ("pmpq", "outlier_ratio"))))
    table = pd.DataFrame(found, columns=["block", "pmpq", "outlier_ratio"])
    return table.astype({"block": "Int64", "pmpq": float, "outlier_ratio": float})


def perplexity_bytes(rows: Sequence[Row]) -> pd.DataFrame:
    """A row per checkpoint and text whose perplexity and size are both known."""
    found = [
        (row.name, text, value, row.figures.bytes)
        for row in rows
        for text, value in row.figures.perplexity.items()
        if value is not None and row.figures.bytes is not None
    ]
    table = pd.DataFrame(found, columns=["checkpoint", "text", "perplexity", "bytes"])
    return table.astype({"perplexity": float, "bytes": "int64"})


def notes(rows: Sequence[Row], sensitive: bool) -> list[Note]:
    """What a reader has to know to read the figures right, told only where the data says it.

    Args:
        rows: the five checkpoints.
        sensitive: whether the sensitivity table holds a value.
    """
    by = {row.name: row for row in rows}
    found = [*_about_masks(rows), *_about_size(by), *_about_quality(by), *_about_forgetting(by)]
    found += [*_about_source(by), *_about_speed(rows)]
    if not sensitive:
        found.append(Note("Sensitivity was not measured, so no block could be given more bits for it."))
    return sorted(found, key=lambda note: not note.alarm)


# Reading


def _read_row(root: Path, name: str) -> Row:
    folder, stage = CHECKPOINTS[name]
    figures = _read_record(Evaluation, root, Path("data/evaluation") / f"{name}.json", f"evaluate@{name}")
    speed = _read_record(Speed, root, Path("data/speed") / f"{name}.json", f"speed@{name}")
    for path, told in (("evaluation", figures.checkpoint), ("speed", speed.checkpoint)):
        if told != name:
            raise Problem(f"data/{path}/{name}.json", f"`checkpoint` is {told!r}", f"valid: {name!r}")
    return Row(name, figures, speed, _read_manifest(root, folder, stage))


R = TypeVar("R", bound=Record)


def _read_record(model: type[R], root: Path, path: Path, stage: str) -> R:
    document = _read_json(root, path, stage)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(step) for step in fault["loc"])
        if fault["type"] == "missing":
            raise Problem(str(path), f"key `{key}` is missing", _again(stage)) from None
        raise Problem(str(path), f"`{key}` is {fault['input']!r}: {fault['msg']}", _again(stage)) from None


def _read_manifest(root: Path, folder: str, stage: str, required: bool = True) -> dict[str, Any]:
    path = Path("data") / folder / "manifest.json"
    return _read_json(root, path, stage) if required or (root / path).exists() else {}


def _read_json(root: Path, path: Path, stage: str) -> dict[str, Any]:
    try:
        document = json.loads((root / path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Problem(str(path), "there is no such file", f"`dvc repro {stage}` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Problem(str(path), f"not valid JSON: {error}", _again(stage)) from None
    if not isinstance(document, dict):
        raise Problem(str(path), "not a JSON object", _again(stage))
    return document


def _read_sensitivity(root: Path) -> pd.DataFrame:
    path = Path("data/sensitivity/sensitivity.csv")
    try:
        table = pd.read_csv(root / path)
    except FileNotFoundError:
        raise Problem(str(path), "there is no such file", "`dvc repro sensitivity` writes it") from None
    except (ValueError, pd.errors.ParserError) as error:  # undecodable text and an empty file are ValueErrors
        raise Problem(str(path), f"not valid CSV: {error}", _again("sensitivity")) from None
    columns = ["layer", "block", "parameters", "pmpq", "outlier_ratio"]
    absent = [column for column in columns if column not in table]
    if absent:
        raise Problem(str(path), f"column `{absent[0]}` is missing", f"valid: {', '.join(columns)}")
    for column in columns[1:]:
        try:
            table[column] = pd.to_numeric(table[column]).astype(float)
        except (ValueError, TypeError) as error:
            raise Problem(str(path), f"column `{column}`: {error}", "every value has to be a number") from None
        table[column] = table[column].where(table[column].abs() < math.inf)
    if table[["block", "parameters"]].isna().to_numpy().any():
        raise Problem(str(path), "a row without block or parameters", _again("sensitivity"))
    return table[columns]


def _again(stage: str) -> str:
    return f"`dvc repro --force --single-item {stage}` writes it again"


# Numbers


def _figures(row: Row) -> dict[str, Any]:
    figures, speed = row.figures, row.speed
    return {
        "perplexity": figures.perplexity,
        "sparsity": figures.sparsity,
        "revived_weights": figures.revived_weights,
        "bytes": figures.bytes,
        "bits_per_weight": figures.bits_per_weight,
        "tokens_per_second": {
            "prefill": speed.prefill_tokens_per_second,
            "decode": speed.decode_tokens_per_second,
        },
        "load_seconds": speed.load_seconds,
        "peak_memory_bytes": speed.peak_memory_bytes,
        "forget": figures.forget.model_dump(),
        "retain": figures.retain.model_dump(),
    }


def _without_missing(figures: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: _without_missing(one) if isinstance(one, dict) else one for key, one in figures.items()}
    return {key: one for key, one in kept.items() if one is not None and one != {}}


def _block(layer: str) -> int | None:
    """The number of the decoder block: the first part of the dotted name that is one."""
    return next((int(part) for part in layer.split(".") if part.isdecimal()), None)


def _mean(values: "pd.Series[float]", weights: "pd.Series[float]") -> float:
    known = values.notna() & (weights > 0)
    total = weights[known].sum()
    return float((values[known] * weights[known]).sum() / total) if total > 0 else math.nan


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def _rise(value: float | None, base: float | None) -> float | None:
    return value - base if value is not None and base is not None else None


# Words


def number(value: Any, digits: int = 1, unit: str = "", sign: bool = False) -> str:
    """A number for people, or an en dash when there is none."""
    if value is None or isinstance(value, bool) or not math.isfinite(value):
        return DASH
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "−") + (f"\u00a0{unit}" if unit else "")


def percent(share: Any, digits: int = 1) -> str:
    """A share from 0 to 1 as a percentage, or an en dash."""
    return number(None if share is None else share * 100, digits, "%")


def megabytes(size: Any) -> str:
    """Bytes in megabytes of a million bytes, or an en dash."""
    return number(None if size is None else size / 1e6)


def figures3(value: Any) -> str:
    """A perplexity, with fewer decimal places the larger it is: they span from 5 to 100,000 and more."""
    return number(value, 0 if value is not None and value >= 1000 else 2 if value is None or value < 10 else 1)


def times(ratio: Any) -> str:
    """A ratio as a multiple: ×1.37, or an en dash."""
    if ratio is None:
        return DASH
    return "×" + number(ratio, 0 if ratio >= 100 else 1 if ratio >= 10 else 2)


def _say(value: Any) -> str:
    """A parameter, a version or a hash as text; no NaN."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else DASH
    return str(value)


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values of nested dictionaries; a list of plain values is one value."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from _flat(one, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        yield path, ", ".join(_say(one) for one in value) or DASH
    else:
        yield path, DASH if value == {} else _say(value)


def _part(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section of a manifest, empty when the manifest has none."""
    value = manifest.get(key)
    return value if isinstance(value, dict) else {}


def _real(value: Any) -> float | None:
    """A number of a manifest, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _method(row: Row) -> str | None:
    """The stage's method; None when it passed the checkpoint through."""
    method = _part(row.manifest, "parameters").get("method")
    return None if method == "none" else str(method or "an unnamed method")


def _named(method: str) -> str:
    return METHODS.get(method, method.replace("_", " "))


def _source_name(source: str) -> str:
    """What people call the model: org/name of a hub address, else the file's name without its ending."""
    if source.startswith("hf://"):
        return source.removeprefix("hf://").split("@")[0]
    return re.sub(r"\.gguf$", "", source.rstrip("/").split("/")[-1], flags=re.I) or "An unnamed model"


def _source_bits(source: str) -> int | None:
    """The bits of a quantised GGUF source, by its name: `...Q4_1.gguf` has 4."""
    found = re.search(r"[-_.]I?Q(\d)(_[A-Z0-9]+)*\.gguf$", source, flags=re.I)
    return int(found[1]) if found else None


def _layer_bits(row: Row) -> dict[str, float]:
    bits = {layer: _real(one) for layer, one in _part(row.manifest, "bits").items()}
    return {layer: one for layer, one in bits.items() if one is not None}


def _deeds(by: Mapping[str, Row]) -> list[str]:
    """What each stage did, a phrase each; a stage that passed the model through says nothing."""
    deeds = []
    if method := _method(by["pruned"]):
        pattern = _part(by["pruned"].manifest, "parameters").get("pattern")
        shape = f" in a {pattern} pattern" if isinstance(pattern, str) and ":" in pattern else ""
        gone = percent(by["pruned"].figures.sparsity, 0)
        deeds.append(f"pruned by {_named(method)} ({gone} of the weights in its linear layers{shape})")
    if method := _method(by["retrained"]):
        share = _real(_part(by["retrained"].manifest, "training").get("trainable_share"))
        trained = "" if share is None else f" ({percent(share, 2 if share < 0.01 else 1)} of the parameters)"
        deeds.append(f"retrained by {_named(method)}{trained}")
    if method := _method(by["quantized"]):
        stored = sorted(set(_layer_bits(by["quantized"]).values()))
        bits = _listed([f"{one:.0f}" for one in stored]) + " bits" if stored else "fewer bits"
        deeds.append(f"quantised to {bits} by {_named(method)}")
    if method := _method(by["unlearned"]):
        deeds.append(f"made to unlearn a text by {_named(method)}")
    return deeds


def _headline(by: Mapping[str, Row], name: str) -> tuple[str, str]:
    """What was done, and what came of it: a sentence each."""
    deeds = _deeds(by)
    done = f"{name} was {_listed(deeds)}." if deeds else f"{name} passed every stage unchanged: each method is none."
    first, last = by["dense"].figures, by[FINAL].figures
    parts = [f"Its weights take {megabytes(last.bytes)} MB on disk instead of {megabytes(first.bytes)} MB"]
    for text in list(first.perplexity)[:1]:
        now, before = last.perplexity.get(text), first.perplexity[text]
        parts.append(f"its perplexity on {text} is {figures3(now)} instead of {figures3(before)}")
    return done, " and ".join(parts) + "."


# Notes


def _about_masks(rows: Sequence[Row]) -> Iterator[Note]:
    for row in rows:
        figures = row.figures
        if figures.revived_weights:
            one = figures.revived_weights == 1
            yield Note(
                f"{number(figures.revived_weights, 0)} pruned weight{' is' if one else 's are'} alive again "
                f"in the {row.name} checkpoint. Its mask does not hold: do not use this checkpoint.",
                alarm=True,
            )
        elif figures.revived_weights is None and figures.sparsity:
            yield Note(f"It is not known whether the {row.name} checkpoint revived pruned weights.", alarm=True)
    zeros = [
        f"{row.name} ({percent(row.figures.zeros)} against {percent(row.figures.sparsity)})"
        for row in rows
        if (rise := _rise(row.figures.zeros, row.figures.sparsity)) is not None and rise > 0.01
    ]
    if zeros:
        yield Note(
            f"More prunable weights are exactly zero than the mask removes in {_listed(zeros)}: the others "
            "were zero in the source or were rounded to it. Sparsity in the table counts the mask alone."
        )


def _about_size(by: Mapping[str, Row]) -> Iterator[Note]:
    base = by["dense"].figures.bytes
    same = [
        name
        for name, row in by.items()
        if name != "dense"
        and row.figures.sparsity
        and (ratio := _ratio(row.figures.bytes, base)) is not None
        and abs(ratio - 1) <= SAME_BYTES
    ]
    if same:
        many = len(same) > 1
        dtype = _part(by["dense"].manifest, "parameters").get("dtype")
        form = f" in {dtype}" if isinstance(dtype, str) and dtype != "source" else ""
        yield Note(
            f"The {_listed(same)} checkpoint{'s take' if many else ' takes'} the same bytes as the "
            f"dense one: a zero stored{form} takes as much room as any other weight. Sparsity alone saves "
            "nothing on disk here."
        )
    masks = by[FINAL].figures.mask_bytes
    if masks:
        yield Note(f"The mask ledger of the {FINAL} checkpoint, {megabytes(masks)} MB, is not counted in its size.")


def _about_quality(by: Mapping[str, Row]) -> Iterator[Note]:
    for name, row in by.items():
        lost = [text for text, value in row.figures.perplexity.items() if value is None]
        if lost:
            yield Note(f"The perplexity of the {name} checkpoint on {_listed(lost)} is missing or not finite.")
    base, last = by["dense"].figures.perplexity, by[FINAL].figures.perplexity
    ratios = {text: _ratio(last.get(text), base[text]) for text in base}
    worse = [f"{text} ({times(ratio)})" for text, ratio in ratios.items() if ratio is not None and ratio > 2]
    if worse:
        yield Note(f"The {FINAL} checkpoint has more than twice the perplexity of the dense one on {_listed(worse)}.")
    if _method(by["retrained"]):
        before, after = by["pruned"].figures.perplexity, by["retrained"].figures.perplexity
        ratios = {text: _ratio(after.get(text), before[text]) for text in before}
        worse = [text for text, ratio in ratios.items() if ratio is not None and ratio > 1]
        if worse:
            yield Note(f"Retraining made the perplexity on {_listed(worse)} worse than pruning had left it.")


def _about_forgetting(by: Mapping[str, Row]) -> Iterator[Note]:
    before, after = by["quantized"].figures, by[FINAL].figures
    if not _method(by[FINAL]):
        return
    retained = _ratio(after.retain.loss, before.retain.loss)
    if retained is not None and retained > 1 + RETAIN_RISE:
        yield Note(
            f"Unlearning cost retained text: its loss rose by {percent(retained - 1)}, from "
            f"{number(before.retain.loss, 2)} to {number(after.retain.loss, 2)} nats a token."
        )
    forgot = _rise(after.forget.loss, before.forget.loss)
    spread = _rise(after.forget.control_loss, before.forget.control_loss)
    if forgot is not None and forgot <= 0:
        yield Note(f"Nothing was forgotten: the loss on the text to forget changed by {number(forgot, 3)} nats.")
    elif forgot is not None and spread is not None and spread > forgot / 2:
        yield Note(
            "Forgetting spread: the loss on the control text, which was never unlearned, rose by "
            f"{number(spread, 2)} nats, that on the text to forget by {number(forgot, 2)}."
        )


def _about_source(by: Mapping[str, Row]) -> Iterator[Note]:
    bits = _source_bits(str(by["dense"].manifest.get("source", "")))
    if bits is not None:
        yield Note(
            f"The source is a {bits}-bit GGUF file: its weights lay on a {bits}-bit grid before anything "
            f"was done, and what that cost is part of the dense row. A {bits}-bit grid here is flattered by "
            "it; from a full-precision source quantisation would cost more."
        )


def _about_speed(rows: Sequence[Row]) -> Iterator[Note]:
    dense = rows[0].speed
    slower = [
        f"{row.name} ({times(ratio)})"
        for row in rows[1:]
        if (ratio := _ratio(row.speed.decode_tokens_per_second, dense.decode_tokens_per_second)) is not None
        and ratio < 0.9
    ]
    if slower:
        yield Note(f"Smaller is not faster here: {_listed(slower)} decode more slowly than the dense checkpoint.")
    places = sorted({f"{row.speed.device}, {row.speed.dtype}" for row in rows})
    if len(places) > 1:
        yield Note(f"The speeds come from different settings ({'; '.join(places)}): do not compare them.")
    else:
        yield Note(f"Speeds and memory were measured once ({places[0]}); they differ from run to run.")


# Pages


def _page(rows: Sequence[Row], extra: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Everything that the two templates show."""
    by = {row.name: row for row in rows}
    told = notes(rows, bool(tables["sensitivity"][["pmpq", "outlier_ratio"]].notna().to_numpy().any()))
    source = _say(by["dense"].manifest.get("source") or "")
    done, result = _headline(by, _source_name(source))
    texts = list(dict.fromkeys(text for row in rows for text in row.figures.perplexity))
    stages = [(CHECKPOINTS[row.name][1], row.manifest) for row in rows]
    if extra:
        stages.insert(1, ("sensitivity", dict(extra)))
    return {
        "name": _source_name(source),
        "source": source or DASH,
        "licence": _say(by["dense"].manifest.get("licence") or DASH),
        "hub": source.removeprefix("hf://").split("@")[0] if source.startswith("hf://") else None,
        "done": done,
        "result": result,
        "tiles": _tiles(by, texts),
        "texts": texts,
        "rows": rows,
        "base": rows[0],
        "final": by[FINAL],
        "alarms": [note.text for note in told if note.alarm],
        "notes": [note.text for note in told if not note.alarm],
        "plots": _plots(by, tables),
        "stages": [_stage(name, manifest) for name, manifest in stages],
        "versions": _versions(stages),
        "inputs": [(name, list(_flat(_part(manifest, "inputs")))) for name, manifest in stages],
        "packed": _method(by["quantized"]) is not None,
        "tokens": by["dense"].figures.forget.tokens,
    }


def _tiles(by: Mapping[str, Row], texts: Sequence[str]) -> list[tuple[str, str, str]]:
    """Label, figure and remark of the few numbers that stand large at the top: the last checkpoint's."""
    first, last = by["dense"], by[FINAL]
    size = _ratio(last.figures.bytes, first.figures.bytes)
    tiles = [
        (
            "On disk",
            f"{megabytes(last.figures.bytes)} MB",
            f"{times(size)} of dense",
        )
    ]
    for text in texts[:2]:
        now, before = last.figures.perplexity.get(text), first.figures.perplexity.get(text)
        tiles.append((f"Perplexity, {text}", figures3(now), f"{times(_ratio(now, before))} of dense"))
    now, before = last.speed.decode_tokens_per_second, first.speed.decode_tokens_per_second
    tiles.append(("Decoding", f"{number(now)} tokens/s", f"{times(_ratio(now, before))} of dense"))
    now, before = last.figures.forget.loss, by["quantized"].figures.forget.loss
    rise = number(_rise(now, before), 2, sign=True)
    tiles.append(("Loss on the text to forget", number(now, 2), f"{rise} nats by unlearning"))
    return tiles


def _plots(by: Mapping[str, Row], tables: Mapping[str, pd.DataFrame]) -> list[dict[str, Any]]:
    bits = _layer_bits(by["quantized"])
    most = max(bits.values(), default=None)
    mixed = len(set(bits.values())) > 1
    stressed = sorted(
        {block for layer, one in bits.items() if mixed and one == most and (block := _block(layer)) is not None}
    )
    drawn = [
        ("Sparsity of every layer", "layer_sparsity", plots.layer_sparsity(tables["layer_sparsity"])),
        (
            "Sensitivity of every block",
            "sensitivity",
            plots.sensitivity(tables["sensitivity"], stressed, most),
        ),
        ("Perplexity against size", "perplexity_bytes", plots.perplexity_bytes(tables["perplexity_bytes"])),
    ]
    return [
        # The SVG is matplotlib's, which escapes the text in it; the caption is escaped by the template.
        {"title": title, "table": table, "name": plot.name, "caption": plot.caption, "svg": Markup(plot.svg)}  # noqa: S704
        for title, table, plot in drawn
    ]


def _stage(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Name, method and the rows of what a stage was told and what it says of itself."""
    parameters = _part(manifest, "parameters")
    training = _part(manifest, "training")
    told = []
    if (count := _real(training.get("trainable_parameters"))) is not None:
        share = _real(training.get("trainable_share"))
        told.append(("parameters trained", number(count, 0) + ("" if share is None else f" ({percent(share, 2)})")))
    losses = [_real(loss) for loss in training.get("losses") or []]
    if losses:
        told.append(("training loss", f"{number(losses[0], 3)} → {number(losses[-1], 3)} in {len(losses)} steps"))
    if training.get("stopped"):
        told.append(("stopped", _say(training["stopped"])))
    stored = list(_part(manifest, "bits").values())
    counts = {_say(bits): stored.count(bits) for bits in sorted(set(stored), key=_say)}
    told += [(f"layers at {bits} bits", number(count, 0)) for bits, count in counts.items()]
    return {
        "name": name,
        "method": parameters.get("method"),
        "parameters": list(_flat(parameters)),
        "told": told,
    }


def _versions(stages: Sequence[tuple[str, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """Package and version; where the stages ran with different ones, each with the stages that had it."""
    seen: dict[str, dict[str, list[str]]] = {}
    for stage, manifest in stages:
        for package, version in _part(manifest, "versions").items():
            seen.setdefault(str(package), {}).setdefault(_say(version), []).append(stage)
    return [
        (
            package,
            next(iter(had)) if len(had) == 1 else "; ".join(f"{v} ({', '.join(s)})" for v, s in had.items()),
        )
        for package, had in sorted(seen.items())
    ]


def _cell(value: Any) -> str:
    """A value for a cell of a Markdown table: one line, with nothing in it that Markdown would obey."""
    return re.sub(r"([\\|`*\[\]])", r"\\\1", " ".join(str(value).split()))


def _render(template: str, page: Mapping[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "megabytes": megabytes,
        "figures3": figures3,
        "times": times,
        "cell": _cell,
    }
    return environment.get_template(template).render(page, ratio=_ratio, dash=DASH)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    run_stage(main)
