"""The page and the model card: what they say, rendered from their templates."""

import re
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from tasks.reporting import formatting
from tasks.reporting.figures import FORGETTING, answer_share, block_of, cut, in_block, known, privacy_leakage, removed
from tasks.reporting.formatting import (
    STRUCTURES,
    interval,
    listed,
    megabytes,
    number,
    percent,
    perplexity,
    ratio,
    rise,
    setting,
    structures,
    times,
)
from tasks.reporting.harm import REFERENCES, ROLES, judged, removed_harm
from tasks.reporting.inputs import Manifest, Run, Training
from tasks.reporting.notes import NOISE, alarms, notes, timing_spread
from tasks.reporting.plots import Plot, forgetting, layer_sparsity, losses, perplexity_bytes, pruning_costs, sensitivity

METHODS = {
    "magnitude": "magnitude pruning",
    "wanda": "Wanda",
    "sparsegpt": "SparseGPT",
    "magnitude_obs": "magnitude with SparseGPT's update",
    "wanda_obs": "Wanda with SparseGPT's update",
    "alps": "ALPS",
    "surgeon": "LLM Surgeon",
    "subset": "training a few parameters",
    "mask_lora": "masked LoRA",
    "scale_lora": "ScaleLoRA",
    "lora_prune": "LoRA cut to the mask",
    "lora": "LoRA kept beside the weights",
    "full": "training every parameter under the mask",
    "rtn": "rounding to nearest",
    "gptq": "GPTQ",
    "given": "packing the grid that pruning rounded to",
    "gradient_ascent": "gradient ascent",
    "grad_diff": "gradient ascent beside retained text",
    "llmu": "gradient ascent, random answers and KL on retained text",
    "npo": "NPO",
    "simnpo": "SimNPO",
    "dpo": "DPO towards refusals",
    "refuse": "descent on refusals",
    "rmu": "RMU",
    "undial": "UNDIAL",
}


def describe(run: Run, tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Everything that the two templates show."""
    origin = run["dense"].manifest
    hub = origin.source.removeprefix("hf://").split("@")[0] if origin.source.startswith("hf://") else None
    name = hub or re.sub(r"\.gguf$", "", origin.source.rstrip("/").split("/")[-1], flags=re.I)
    return {
        "name": name,
        "hub": hub,
        "source": origin.source,
        "licence": origin.licence,
        "headline": _headline(run, name),
        "tiles": _tiles(run),
        "texts": list(run["dense"].figures.perplexity),
        "run": run,
        "forgetting": FORGETTING,
        "harm": (harm := judged(run)),
        "judged_roles": [role for role in ROLES if any(role in roles for roles in harm.values())],
        "references": REFERENCES,
        "alarms": alarms(run),
        "notes": notes(run, bool(tables["sensitivity"]["sensitivity"].notna().any())),
        "plots": _plots(run, tables),
        "stages": [(row.manifest, _details(row.manifest)) for row in run.values()],
    }


def render(template: str, page: dict[str, Any]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    for word in ("number", "percent", "interval", "megabytes", "perplexity", "times", "setting"):
        environment.filters[word] = getattr(formatting, word)
    environment.filters["cell"] = _cell
    calls = (ratio, known, answer_share, privacy_leakage, removed, cut)
    return environment.get_template(template).render(page, **{call.__name__: call for call in calls})


def _cell(value: str) -> str:
    """A value in Markdown: one line, with nothing in it that Markdown would obey."""
    return re.sub(r"([\\|`*\[\]])", r"\\\1", " ".join(value.split()))


def _headline(run: Run, name: str) -> str:
    """What was done, and what came of it."""
    deeds = _deeds(run)
    done = f"{name} was {listed(deeds)}." if deeds else f"{name} passed every stage unchanged: each method is none."
    first, last = run["dense"].figures, run["unlearned"].figures
    text, before = next(iter(first.perplexity.items()))
    return (
        f"{done} Its weights take {megabytes(last.bytes)} MB on disk instead of {megabytes(first.bytes)} MB and its "
        f"perplexity on {text} is {perplexity(last.perplexity[text])} instead of {perplexity(before)}."
    )


def _deeds(run: Run) -> list[str]:
    """A phrase for every stage that did something."""
    pruned, trained = run["pruned"], run["retrained"].manifest.training
    gone = percent(removed(pruned, run["dense"]), 0)
    shape = _shape(pruned.manifest) + (" cut out" if cut(pruned, run["dense"]) else "")
    bits = listed([str(one) for one in sorted(set(run["quantized"].manifest.bits.values()))] or ["?"])
    share = percent(trained.trainable_share) if trained else ""
    tuned = ", its scales tuned" if run["quantized"].manifest.training else ""
    deeds = {
        "taught": "taught a text by heart",
        "pruned": f"pruned by {{}} ({gone} of the weights in its linear layers{shape})",
        "retrained": f"retrained by {{}} ({share} of the parameters)",
        "quantized": f"quantised to {bits} bits by {{}}{tuned}",
        "unlearned": "made to unlearn a text by {}",
    }
    methods = {name: run[name].manifest.method for name in deeds if name in run}
    return [deeds[name].format(METHODS.get(method, method)) for name, method in methods.items() if method]


def _shape(manifest: Manifest) -> str:
    """In which shapes weights went."""
    pattern = manifest.parameters.get("pattern", "unstructured")
    if pattern == "unstructured":
        return ""
    if ":" in pattern:
        return f" in a {pattern} pattern"
    return f", whole {listed([STRUCTURES.get(kind, kind) for kind in pattern.split('+')])}"


def _block_errors(training: Training) -> str:
    """Mean error of the parts that were reconstructed, relative to what a dense block adds."""
    before, after = (
        sum(getattr(part, when) for part in training.block_errors) / len(training.block_errors)
        for when in ("before", "after")
    )
    left = sum(not part.learned for part in training.block_errors)
    tail = f"; {left} of {len(training.block_errors)} left as they were" if left else ""
    return f"{percent(before, 2)} to {percent(after, 2)} on average{tail}"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """Label, figure and remark of the few numbers that stand large at the top: the last checkpoint's."""
    first, last = run["dense"], run["unlearned"]
    tiles = [("On disk", f"{megabytes(last.figures.bytes)} MB", ratio(last.figures.bytes, first.figures.bytes))]
    for text, before in list(first.figures.perplexity.items())[:2]:
        now = last.figures.perplexity[text]
        tiles.append((f"Perplexity, {text}", perplexity(now), ratio(now, before)))
    told = [(label, figure, f"{times(share)} of dense") for label, figure, share in tiles]
    rate = last.speed.kernel_decode or last.speed.decode_tokens_per_second
    share = times(rate / first.speed.decode_tokens_per_second)
    means = ", with kernels" if last.speed.kernels else ""
    remark = "too noisy to compare" if timing_spread(run) > NOISE else f"{share} of dense{means}"
    told.append(("Decoding", f"{number(rate)} tokens/s", remark))
    now, before = last.figures.forget.loss, run["quantized"].figures.forget.loss
    forgot = number(rise(now, before), 2, sign=True)
    told.append(("Loss on the text to forget", number(now, 2), f"{forgot} nats by unlearning"))
    return [*told, *_harm(run)]


def _harm(run: Run) -> list[tuple[str, str, str]]:
    """Where the text to forget is questions, a tile of how much rarer harmful answers have become."""
    effect = removed_harm(run, "quantized", "unlearned", "forget")
    if effect is None:
        return []
    before, after = (run[name].figures.harm["forget"] for name in ("quantized", "unlearned"))
    remark = (
        f"{percent(before.rate)} harmful before, {percent(after.failed)} harmful or gibberish after; of "
        f"{after.answers} answers, so {interval(effect)}"
    )
    return [("Harmful answers removed", percent(effect.value), remark)]


def _plots(run: Run, tables: dict[str, pd.DataFrame]) -> list[Plot]:
    stored = run["quantized"].manifest.bits
    bits = {layer: one for layer, one in stored.items() if in_block(layer)}
    least, most = min(bits.values(), default=0), max(bits.values(), default=0)
    fine = {block_of(layer) for layer, one in bits.items() if one > least}
    costs = tables["pruning_costs"]
    return [
        layer_sparsity(tables["layer_sparsity"]),
        *([] if costs.empty else [pruning_costs(costs)]),
        sensitivity(tables["sensitivity"], fine, most),
        perplexity_bytes(tables["perplexity_bytes"]),
        losses(tables["losses"]),
        forgetting(tables["forgetting"]),
    ]


def _details(manifest: Manifest) -> dict[str, str]:
    """What a stage was told, and what it says of itself."""
    told = {key: setting(value) for key, value in manifest.settings.items()}
    if costs := manifest.costs:
        worst = max(costs, key=lambda layer: costs[layer])
        most = f"most in {worst} with {costs[worst]:.3g}"
        told["predicted loss increase"] = f"{number(sum(costs.values()), 3)} nats a token; {most}"
    if manifest.corrections:
        learned = [f"{number(losses[0], 3)} → {number(losses[-1], 3)}" for losses in manifest.corrections]
        told["losses of the corrections between shots"] = listed(learned)
    if shrunk := manifest.shrunk:
        told["width of every block"] = structures(shrunk.widths)
        told["padding"] = f"{number(shrunk.padding, 0)} weights"
    if training := manifest.training:
        if training.trainable_parameters is not None:
            share = percent(training.trainable_share, 2)
            told["parameters trained"] = f"{number(training.trainable_parameters, 0)} ({share})"
        for name, curve in training.curves.items():
            told[f"{name} loss"] = f"{number(curve[0], 3)} → {number(curve[-1], 3)} in {len(curve)} steps"
        if training.searched:
            tried = [f"{rate} ({number(loss, 3)})" for rate, loss in training.searched.items()]
            told["learning rates tried"] = f"{listed(tried)}, loss on held-out text"
        if len(training.held_out) > 1:
            told["held-out loss"] = f"{number(training.held_out[0], 3)} to {number(min(training.held_out), 3)}"
        if training.memorised:
            first, best = training.memorised[0], max(training.memorised)
            told["known by heart"] = f"{percent(first)} to {percent(best)} of the tokens"
        if training.merge_jump:
            told["lost by merging"] = f"{number(training.merge_jump, 3)} nats"
        if training.block_errors:
            told["error of a block"] = _block_errors(training)
        told["stopped"] = training.stopped
        if training.changed_codes is not None:
            told["weights changed"] = percent(training.changed_codes, 2)
        if training.changed_scales is not None:
            told["scales changed"] = percent(training.changed_scales, 2)
    if manifest.stage == "quantize":
        stored = list(manifest.bits.values())
        told |= {f"layers at {bits} bits": str(stored.count(bits)) for bits in sorted(set(stored))}
    return told
