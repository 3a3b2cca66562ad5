"""Stage unlearn: forget a text on the very weights that ship."""

from importlib import import_module

import torch
from transformers import AutoTokenizer

from compression.core.checkpoint import Checkpoint, CheckpointWriter
from compression.core.journal import Journal
from compression.core.skeleton import Skeleton
from compression.evaluation.loss import token_losses
from compression.quantization.packed import block_reader, plain_outer
from compression.training.loop import Recipe
from compression.training.samples import Samples
from compression.unlearning import METHODS, TRAINED
from compression.unlearning.run import unlearn_model
from compression.unlearning.watch import compared, judged
from tasks.core.entry import run_stage
from tasks.core.passing import lineage, pass_through
from tasks.core.paths import DATA
from tasks.core.stage import Stage, open_stage
from tasks.core.text import corpus_file, is_empty, read_samples
from tasks.params.base import read
from tasks.params.unlearn import Unlearn

NEVER_TAUGHT = DATA / "model"


def main() -> None:
    params = read(Unlearn)
    method = import_module(METHODS[params.method])
    inputs = [DATA / "quantized", NEVER_TAUGHT, *map(corpus_file, ("forget", "control", "neighbours", "training"))]
    stage = open_stage("unlearn", DATA / "unlearned", inputs, params)
    source = Checkpoint(DATA / "quantized")
    folder = stage.work / "checkpoint"
    if params.method == "none":
        pass_through(source, folder, stage.record(params))
        return stage.publish(folder)
    forget, retain = (read_role(role, params) for role in ("forget", "training"))
    if not is_empty("neighbours"):
        retain = beside(read_role("neighbours", params), retain)
    options = params.model_dump(exclude={"steps", "learning_rate", "warmup", "clip"})
    if params.forget_ceiling == "reference":
        options["forget_ceiling"] = never_taught_loss(judged(forget, params.held_out), stage)
    control = None
    if params.forget_ceiling == "control":
        options["forget_ceiling"], control = None, compared(read_role("control", params), params.held_out)
    writer = CheckpointWriter(folder, source.folder)
    training = unlearn_model(
        source,
        writer,
        Journal(stage.work / "journal"),
        method,
        import_module(TRAINED[params.train]),
        options,
        Recipe(params.steps, params.learning_rate, params.warmup, params.clip),
        forget,
        retain,
        control,
        refusals(params) if "refusals" in method.SETTINGS else [],
        params.sequences,
        stage.device,
        stage.dtype,
    )
    writer.finish(source.depth, lineage(source) | stage.record(params) | {"training": training})
    stage.publish(folder)


def read_role(role: str, params: Unlearn) -> Samples:
    """All samples of a role."""
    return read_samples(role, None, params.length, "params.yaml: unlearn.length", params.prompt)


def beside(neighbours: Samples, training: Samples) -> Samples:
    """Both, the training text last; the neighbours as often as it takes for them to be drawn about as often as that."""
    times = max(1, round(len(training.ids) / len(neighbours.ids)))
    rows = torch.arange(len(neighbours.ids)).repeat(times)
    return Samples(*(torch.cat(pair) for pair in zip(neighbours.take(rows), training, strict=True)))


def refusals(params: Unlearn) -> list[list[int]]:
    """Token ids of the answers that dpo prefers, each with the token that ends an answer."""
    tokenizer = AutoTokenizer.from_pretrained(NEVER_TAUGHT, trust_remote_code=False, local_files_only=True)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    return [tokenizer(text, add_special_tokens=False)["input_ids"] + end for text in params.refusals]


def never_taught_loss(samples: Samples, stage: Stage) -> float:
    """Mean loss of the downloaded model, which was not taught, over the answers' tokens, in nats."""
    model = Checkpoint(NEVER_TAUGHT)
    skeleton = Skeleton(model.folder, plain_outer(model), block_reader(model), stage.device, stage.dtype)
    losses = token_losses(skeleton, {"forget": samples.ids})["forget"]
    return losses[samples.answer[:, 1:]].double().mean().item()


if __name__ == "__main__":
    run_stage(main)
