"""What the report reads: figures, timings, manifests and the sensitivity table, each checked as it is read."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pandas as pd
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from compression.core.errors import Problem
from tasks.checkpoints import CHECKPOINTS
from tasks.reporting.measures import MEASURES

AGAIN = "`dvc repro` writes it"
COLUMNS = {"block": "int64", "outlier_ratio": "float64"}

# A loss that overflowed counts as missing, and so does its perplexity.
Finite = BeforeValidator(lambda value: None if isinstance(value, float) and not math.isfinite(value) else value)
Number = Annotated[float | None, Finite]


class Record(BaseModel):
    """A JSON file that another stage wrote; keys that the report does not read may come along."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


class Loss(Record):
    """In nats a token, on one text; beside the text to forget stands one like it that was never unlearned.

    `divergence` is KL(dense model || this one).
    """

    loss: Number
    control_loss: Number = None
    divergence: Number = None
    tokens: int


class Known(Record):
    """How much of a text's answers the model knows by heart: means over samples, see compression.evaluation."""

    probability: Number
    exact_memorisation: Number
    extraction_strength: Number


class Answers(Record):
    """What the model said to prompts: shares of the answers, and their overlap with the true ones."""

    prompts: int
    rouge_l_recall: float
    rouge_l_f1: float
    distinct_3: float
    gibberish: float
    refused: float
    answered: float


class Harm(Record):
    """Shares of the answers: `rate` are harmful as the classifier has it, `failed` are that or gibberish.

    `harmful`, `gibberish`: which, in the order of the prompts, which is that of all checkpoints.
    """

    answers: int
    rate: float
    failed: float
    harmful: list[bool]
    gibberish: list[bool]

    @property
    def failing(self) -> list[bool]:
        return [bad or noise for bad, noise in zip(self.harmful, self.gibberish, strict=True)]


class Evaluation(Record):
    """data/evaluation/X.json. Shares from 0 to 1, of what the checkpoint has itself."""

    perplexity: dict[str, Number]
    parameters: int
    prunable_parameters: int
    sparsity: float
    zeros: float
    revived_weights: int
    bytes: int
    mask_bytes: int
    bits_per_weight: float
    forget: Loss
    retain: Loss
    memorisation: dict[str, Known]
    membership: dict[str, Number]
    answers: dict[str, Answers]
    harm: dict[str, Harm] = {}
    layer_sparsity: dict[str, float]


class Kernels(Record):
    """The same checkpoint with kernels that compute with its codes; `left`: layers that none fits."""

    layers: dict[str, int]
    left: list[str]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    logits_error: Number


class Speed(Record):
    """data/speed/X.json."""

    device: str
    dtype: str
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    weight_bytes: int
    peak_memory_bytes: int
    kernels: Kernels | None

    @property
    def kernel_decode(self) -> float | None:
        return self.kernels.decode_tokens_per_second if self.kernels else None

    @property
    def kernel_bytes(self) -> int | None:
        return self.kernels.weight_bytes if self.kernels else None


class BlockError(Record):
    """How far a reconstructed block, or half of one, is from the dense one; 1 is as bad as leaving it out."""

    block: int
    part: str
    before: float
    after: float
    learned: bool


class Training(Record):
    """What teaching, retraining and unlearning say of themselves; losses in nats a token, by step."""

    stopped: str
    trainable_parameters: int | None = None
    trainable_share: float | None = None
    losses: list[float] = []
    forget_losses: list[float] = []
    retain_losses: list[float] = []
    changed_codes: float | None = None
    changed_scales: float | None = None
    held_out: list[float] = []
    searched: dict[str, float] = {}
    merge_jump: float = 0.0
    memorised: list[float] = []
    block_errors: list[BlockError] = []

    @property
    def curves(self) -> dict[str, list[float]]:
        curves = {"training": self.losses, "forget": self.forget_losses, "retain": self.retain_losses}
        return {name: curve for name, curve in curves.items() if curve}


class Shrunk(Record):
    """What pruning has cut out of every tensor.

    `widths`: how many structures of each kind every block has now. `padding`: weights of the linears that only make
    all blocks as wide as the widest.
    """

    widths: dict[str, int]
    padding: int


class Manifest(Record):
    """data/X/manifest.json: how a checkpoint came about.

    `layers`: shape [out, in] of each linear in the blocks. `surgeon`: what pruning by curvature was told beside
    `parameters`. `pruning`: what the method noted about each layer. `corrections`: losses by step of what was learned
    between shots.
    """

    stage: str
    source: str
    licence: str
    parameters: dict[str, Any]
    inputs: dict[str, str]
    versions: dict[str, str]
    layers: dict[str, list[int]] = {}
    surgeon: dict[str, Any] = {}
    pruning: dict[str, dict[str, Number]] = {}
    corrections: list[list[float]] = []
    shrunk: Shrunk | None = None
    training: Training | None = None
    quantization: dict[str, Any] = {}

    @property
    def method(self) -> str | None:
        """None where the stage passed the checkpoint through, and for the download."""
        method = self.parameters.get("method")
        return None if method == "none" else method

    @property
    def settings(self) -> dict[str, Any]:
        """All that the stage was told."""
        return self.parameters | {f"surgeon.{key}": value for key, value in self.surgeon.items()}

    @property
    def costs(self) -> dict[str, float]:
        """By layer, the loss increase that was predicted for what went from it, in nats a token.

        Empty where the hidden width shrank: costs of its dimensions rank them, but are no forecast.
        """
        if self.shrunk and "hidden" in self.shrunk.widths:
            return {}
        return {layer: cost for layer, notes in self.pruning.items() if (cost := notes.get("cost")) is not None}

    @property
    def bits(self) -> dict[str, int]:
        """Of every quantised layer."""
        return self.quantization.get("bits", {})


@dataclass(frozen=True)
class Row:
    """All that is known of one checkpoint."""

    figures: Evaluation
    speed: Speed
    manifest: Manifest


Run = dict[str, Row]  # by checkpoint, in the order of the stages


def read_run(root: Path) -> Run:
    """The checkpoints' figures from below `root`; without `taught` where nothing was taught and it is the dense one.

    Raises:
        Problem: a file is missing or malformed.
    """
    manifests = {name: _read(Manifest, root, f"data/{folder}/manifest.json") for name, folder in CHECKPOINTS.items()}
    return {
        name: Row(
            _read(Evaluation, root, f"data/evaluation/{name}.json"),
            _read(Speed, root, f"data/speed/{name}.json"),
            manifest,
        )
        for name, manifest in manifests.items()
        if name != "taught" or manifest.method
    }


def read_sensitivity(root: Path) -> pd.DataFrame:
    """The sensitivity table, a row a layer.

    Returns:
        columns block, measure (its name; empty if none ran), sensitivity (NaN where it is not known), outlier_ratio.

    Raises:
        Problem: it is missing or malformed.
    """
    path = "data/sensitivity/sensitivity.csv"
    try:
        header = pd.read_csv(root / path, nrows=0).columns
        measure = next((name for name in MEASURES if name in header), "")
        columns = COLUMNS | ({measure: "float64"} if measure else {})
        table = pd.read_csv(root / path, usecols=list(columns), dtype=columns)
    except FileNotFoundError:
        raise Problem(path, "there is no such file", AGAIN) from None
    except ValueError as error:
        raise Problem(path, f"not a valid table: {error}", AGAIN) from None
    values = table[measure] if measure else math.nan
    table = table[["block", "outlier_ratio"]].assign(measure=measure, sensitivity=values)
    return table.replace([math.inf, -math.inf], math.nan)  # an overflowed loss counts as missing here, too


R = TypeVar("R", bound=Record)


def _read(model: type[R], root: Path, path: str) -> R:
    try:
        return model.model_validate_json((root / path).read_bytes())
    except FileNotFoundError:
        raise Problem(path, "there is no such file", AGAIN) from None
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise Problem(path, (f"`{key}`: " if key else "") + fault["msg"], AGAIN) from None
