"""What a reader has to know to read the figures right, told only where the data says it."""

import re
from collections.abc import Iterator

from tasks.reporting.figures import answer_share, cut
from tasks.reporting.formatting import listed, megabytes, number, percent, ratio, rise, structures, times
from tasks.reporting.inputs import Run

SAME_BYTES = 0.02  # two sizes closer than this share are told as the same
RETAIN_RISE = 0.05  # rise of the retained text's loss, as a share, from which on the page says so
GIBBERISH_RISE = 0.02  # of the share of answers that are gibberish, from which on the page says so
FASTER = 1.1  # times the dense checkpoint's decoding speed, from which on the page says so
NOISE = 1.25  # fastest over slowest of equal work, from which on timings tell nothing


def alarms(run: Run) -> list[str]:
    """What makes a checkpoint unusable."""
    return [
        f"{number(count, 0)} pruned weight{' is' if count == 1 else 's are'} alive again in the {name} checkpoint. "
        "Its mask does not hold: do not use this checkpoint."
        for name, row in run.items()
        if (count := row.figures.revived_weights)
    ]


def notes(run: Run, sensitive: bool) -> list[str]:
    """A sentence or two each.

    Args:
        sensitive: whether the sensitivity of the blocks was measured.
    """
    tellers = (_size, _smaller, _zeros, _unseen, _surgery, _quality, _forgetting, _source, _loading, _speed)
    found = [note for tell in tellers for note in tell(run)]
    if not sensitive:
        found.append("The loss increase of the blocks was not measured: no block could be given more bits for it.")
    return found


def _size(run: Run) -> Iterator[str]:
    dense = run["dense"].figures.bytes
    same = [
        name for name, row in run.items() if row.figures.sparsity and abs(row.figures.bytes / dense - 1) <= SAME_BYTES
    ]
    if same:
        yield (
            f"The {listed(same)} checkpoint{'s take' if len(same) > 1 else ' takes'} the same bytes as the dense "
            "one: a stored zero takes as much room as any other weight. Sparsity alone saves nothing on disk here."
        )
    if masks := run["unlearned"].figures.mask_bytes:
        yield f"The mask ledger of the unlearned checkpoint, {megabytes(masks)} MB, is not counted in its size."


def _smaller(run: Run) -> Iterator[str]:
    """What was cut out, and what is there only to fill up."""
    dense, pruned = run["dense"], run["pruned"]
    if (shrunk := pruned.manifest.shrunk) is None:
        return
    if gone := cut(pruned, dense):
        left = pruned.figures.parameters / dense.figures.parameters
        yield (
            f"Pruning has made the model smaller, not only sparser: {percent(gone)} of the weights in the linear "
            f"layers of its blocks were cut out. It has {number(pruned.figures.parameters, 0)} parameters, "
            f"{percent(1 - left)} fewer than the dense one, and {structures(shrunk.widths)} in every block."
        )
    if shrunk.padding:
        share = percent(shrunk.padding / pruned.figures.prunable_parameters)
        whole = "" if gone else "Nothing could be cut out, since some block keeps all that it had. "
        yield (
            "Blocks keep different widths, but transformers builds all as wide as the widest: "
            f"{number(shrunk.padding, 0)} weights, {share} of those that are left in the linear layers, are zeros that "
            f"fill the others up. {whole}They count as removed, yet take their bytes and their time."
        )


def _unseen(run: Run) -> Iterator[str]:
    """Experts of which calibration could say nothing."""
    layers = [layer for layer, noted in run["pruned"].manifest.pruning.items() if noted.get("unseen")]
    if layers:
        yield (
            f"No calibration token was sent to {number(len(layers), 0)} experts' layers, so they were pruned by "
            f"magnitude alone: {listed(layers)}. More calibration text (prune.sequences) may reach them."
        )


def _surgery(run: Run) -> Iterator[str]:
    """What pruning by curvature had expected, beside what came of it."""
    manifest = run["pruned"].manifest
    if not (manifest.surgeon and manifest.costs):
        return
    shots = manifest.surgeon["shots"]
    before, after = (run[name].figures.retain.loss for name in ("dense", "pruned"))
    rose = rise(after, before)
    came = f"; that on retained text changed by {number(rose, 2, sign=True)}" if rose is not None else ""
    yield (
        f"LLM Surgeon pruned in {number(shots, 0)} shot{'' if shots == 1 else 's'} and predicted that the loss on its "
        f"calibration text would rise by {number(sum(manifest.costs.values()), 2)} nats a token, each part that went "
        f"seen for itself{came}."
    )


def _zeros(run: Run) -> Iterator[str]:
    more = [
        f"{name} ({percent(row.figures.zeros)} against {percent(row.figures.sparsity)})"
        for name, row in run.items()
        if row.figures.zeros - row.figures.sparsity > 0.01
    ]
    if more:
        yield (
            f"More prunable weights are exactly zero than the mask removes in {listed(more)}: the others were zero "
            "in the source or were rounded to it. The table does not count them as removed."
        )


def _quality(run: Run) -> Iterator[str]:
    for name, row in run.items():
        if lost := [text for text, value in row.figures.perplexity.items() if value is None]:
            yield f"The perplexity of the {name} checkpoint on {listed(lost)} is not finite."
    ratios = _perplexity_ratios(run, "unlearned", "dense")
    if worse := [f"{text} ({times(one)})" for text, one in ratios.items() if one > 2]:
        yield f"The unlearned checkpoint has more than twice the perplexity of the dense one on {listed(worse)}."
    ratios = _perplexity_ratios(run, "retrained", "pruned")
    if worse := [text for text, one in ratios.items() if one > 1]:
        yield f"Retraining made the perplexity on {listed(worse)} worse than pruning had left it."


def _perplexity_ratios(run: Run, name: str, base: str) -> dict[str, float]:
    """By text, where both perplexities are known."""
    after, before = run[name].figures.perplexity, run[base].figures.perplexity
    return {text: one for text in before if (one := ratio(after[text], before[text])) is not None}


def _forgetting(run: Run) -> Iterator[str]:
    if not run["unlearned"].manifest.method:
        return
    before, after = run["quantized"].figures, run["unlearned"].figures
    retained = ratio(after.retain.loss, before.retain.loss)
    if retained is not None and retained > 1 + RETAIN_RISE:
        yield (
            f"Unlearning cost retained text: its loss rose by {percent(retained - 1)}, from "
            f"{number(before.retain.loss, 2)} to {number(after.retain.loss, 2)} nats a token."
        )
    forgot = rise(after.forget.loss, before.forget.loss)
    spread = rise(after.forget.control_loss, before.forget.control_loss)
    if forgot is not None and forgot <= 0:
        yield f"Nothing was forgotten: the loss on the text to forget changed by {number(forgot, 3)} nats."
    elif forgot is not None and spread is not None and spread > forgot / 2:
        yield (
            "Forgetting spread: the loss on the control text, which was never unlearned, rose by "
            f"{number(spread, 2)} nats, that on the text to forget by {number(forgot, 2)}."
        )
    said, told = answer_share(run["unlearned"], "gibberish"), answer_share(run["quantized"], "gibberish")
    if (worse := rise(said, told)) is not None and worse > GIBBERISH_RISE:
        yield (
            f"Unlearning cost the model its language: {percent(said)} of its answers are gibberish, {percent(told)} "
            "before it. Not to speak at all is no forgetting."
        )


def _source(run: Run) -> Iterator[str]:
    """A quantised GGUF source says so in its name: `...Q4_1.gguf` has 4 bits."""
    found = re.search(r"[-_.]I?Q(\d)(_[A-Z0-9]+)*\.gguf$", run["dense"].manifest.source, flags=re.I)
    if found:
        yield (
            f"The source is a {found[1]}-bit GGUF file: its weights lay on a {found[1]}-bit grid before anything was "
            f"done, and what that cost is part of the dense row. A {found[1]}-bit grid here is flattered by it; from "
            "a full-precision source quantisation would cost more."
        )


def _loading(run: Run) -> Iterator[str]:
    """Whether vLLM takes the quantised file, as far as its schema tells."""
    if (faults := run["quantized"].manifest.quantization.get("vllm_faults")) is None:
        return
    if faults:
        yield f"transformers loads the quantised checkpoint; vLLM is not expected to: {'; '.join(faults)}."
    else:
        yield "By its schema vLLM takes the quantised checkpoint, as transformers does; vLLM was not run."


def _speed(run: Run) -> Iterator[str]:
    places = sorted({f"{row.speed.device}, {row.speed.dtype}" for row in run.values()})
    if len(places) > 1:
        yield f"The speeds come from different settings ({'; '.join(places)}): do not compare them."
        return
    yield f"Speeds are medians of a few repeats ({places[0]}), memory a single peak; both differ from run to run."
    if (spread := timing_spread(run)) > NOISE:
        yield (
            f"The timings are noise: checkpoints of one format do the same work, yet their speeds differ by "
            f"{times(spread)}. Measure again on an idle machine before comparing speeds."
        )
        return
    yield from _speed_of_codes(run)


def _speed_of_codes(run: Run) -> Iterator[str]:
    """What quantised formats buy beside bytes."""
    dense, idle = run["dense"].speed, []
    for name, row in run.items():
        if not row.manifest.bits:
            continue
        plain, kernels = row.speed.decode_tokens_per_second / dense.decode_tokens_per_second, row.speed.kernels
        coded = (row.speed.kernel_decode or 0) / dense.decode_tokens_per_second
        if kernels and coded >= FASTER:
            layers = listed([f"{count} on {kernel}" for kernel, count in kernels.layers.items()])
            left = f", {len(kernels.left)} that none fits" if kernels.left else ""
            prefill = kernels.prefill_tokens_per_second / dense.prefill_tokens_per_second
            yield (
                f"With kernels that compute with codes (layers: {layers}{left}) the {name} checkpoint decodes at "
                f"{times(coded)} of dense and reads prompts at {times(prefill)}; its weights take "
                f"{megabytes(kernels.weight_bytes)} MB of memory instead of {megabytes(dense.weight_bytes)} MB. Loaded "
                f"by transformers alone it is unpacked at the first pass and decodes at {times(plain)}."
            )
        elif plain < FASTER:
            idle.append(f"{name} ({times(max(plain, coded))}{' with kernels' if coded > plain else ''})")
    if idle:
        gain, whose = ("gain", "Their") if len(idle) > 1 else ("gains", "Its")
        yield (
            f"Smaller is not faster here: beside dense, decoding {listed(idle)} {gain} nothing. {whose} format buys "
            "bytes only."
        )


def timing_spread(run: Run) -> float:
    """Fastest over slowest among checkpoints whose timings should be equal: all plain ones, all quantised ones."""
    speeds = [[row.speed for row in run.values() if bool(row.manifest.bits) == packed] for packed in (False, True)]
    rates = [
        [getattr(speed, rate) for speed in same]
        for same in speeds
        for rate in ("prefill_tokens_per_second", "decode_tokens_per_second")
        if same
    ]
    return max(max(same) / min(same) for same in rates)
