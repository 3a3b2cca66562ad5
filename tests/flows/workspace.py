"""A small pipeline in a folder of its own, with stages that take no time unless a test says so."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]

STEP = '''
"""One stage: writes what it makes of its inputs; a test can make it slow or make it fail."""
import json, os, pathlib, sys, time
import yaml

name, output, *inputs = sys.argv[1:]
work = pathlib.Path(os.environ["STEP_WORK"])
knobs = json.loads((work / "knobs.json").read_text()).get(name, {})
began = time.time()
print(f"hello from {name}", flush=True)
if knobs.get("child"):  # a grandchild that would outlive us
    import subprocess
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "pareline-test-grandchild"])
print(f"visible {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
(work / f"{name}.started").write_text(str(os.getpid()))
time.sleep(knobs.get("sleep", 0))
if "fail" in knobs:
    print("some progress before", file=sys.stderr)
    print(knobs["fail"], file=sys.stderr)
    sys.exit(3)
value = yaml.safe_load(open("params.yaml")).get(name.partition("@")[0], {}).get("value", 0)
path = pathlib.Path(output)
path.parent.mkdir(parents=True, exist_ok=True)
texts = "".join(pathlib.Path(item).read_text() for item in inputs)
path.write_text(f"{name} {value if isinstance(value, str) else int(value)}\\n{texts}")
with (work / "times.txt").open("a") as file:
    file.write(f"{name} {began} {time.time()}\\n")
'''

CHECK = '''
"""Stands for the real check: every section's value has to be below 100."""
import sys
import yaml

for section, keys in yaml.safe_load(open("params.yaml")).items():
    if isinstance(keys.get("value"), int) and keys["value"] >= 100:
        print(f"params.yaml: `{section}.value` is {keys['value']}: it has to be below 100", file=sys.stderr)
        sys.exit(1)
'''

PIPELINE = """
stages:
  source:
    cmd: python step.py source data/source.txt
    params: [source]
    outs: [data/source.txt]
  left:
    cmd: python step.py left data/left.txt data/source.txt
    deps: [data/source.txt]
    params: [left]
    outs: [data/left.txt]
  right:
    cmd: python step.py right data/right.txt data/source.txt
    deps: [data/source.txt]
    params: [right]
    outs: [data/right.txt]
  join:
    cmd: python step.py join data/join.txt data/left.txt data/right.txt
    deps: [data/left.txt, data/right.txt]
    outs: [data/join.txt]
  speed:
    foreach: [left, right]
    do:
      cmd: python step.py speed@${item} data/speed-${item}.txt data/${item}.txt
      deps: ["data/${item}.txt"]
      outs: ["data/speed-${item}.txt"]
"""

PARAMS = """\
# a comment that has to survive
compute: {device: cpu, threads: 1}
source: {value: 1}
left: {value: 1, size: [1, 2]}
right: {value: 1, pattern: unstructured}
"""

STAGES = ("left", "right", "join", "source", "speed@left", "speed@right")
COMPLETED = dict.fromkeys(STAGES, "Completed")
CACHED = dict.fromkeys(STAGES, "Cached")


class Workspace:
    """The folder, and what a user can do in it."""

    def __init__(self, root: Path, variables: dict[str, str]) -> None:
        self.root = root
        self.own = variables
        self.work = root / ".work"
        self.variables = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PREFECT", "CUDA"))},
            "STEP_WORK": str(self.work),
            "XDG_CACHE_HOME": str(root.parent / "cache"),
            "COLUMNS": "120",
            **variables,
        }

    def create(self) -> None:
        """A git and DVC repository with the pipeline, committed, nothing run yet."""
        for folder in ("tasks", ".work", "data"):
            (self.root / folder).mkdir(parents=True)
        shutil.copytree(ROOT / "flows", self.root / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "prefect.yaml", self.root)
        self.write("step.py", STEP)
        self.write("tasks/__init__.py", "")
        self.write("tasks/check.py", CHECK)
        self.write("dvc.yaml", PIPELINE)
        self.write("params.yaml", PARAMS)
        self.write(".gitignore", "/.work/\n/.prefect/\n__pycache__/\n")
        self.write(".dvcignore", ".work\n.prefect\n__pycache__\n")
        self.knobs()
        for command in (
            ["git", "init", "-q"],
            [sys.executable, "-m", "dvc", "init", "-q"],
            [sys.executable, "-m", "dvc", "config", "core.analytics", "false"],
            ["git", "add", "-A"],
            ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "start"],
        ):
            subprocess.run(command, cwd=self.root, env=self.variables, check=True)

    def write(self, path: str, text: str) -> None:
        (self.root / path).write_text(text)

    def knobs(self, **knobs: dict[str, object]) -> None:
        """Makes stages slow (`sleep` seconds) or failing (`fail` message)."""
        self.write(".work/knobs.json", json.dumps(knobs))

    def param(self, key: str, value: object) -> None:
        """Edits params.yaml as a user would."""
        section, _, name = key.partition(".")
        params = yaml.safe_load((self.root / "params.yaml").read_text())
        params[section][name] = value
        self.write("params.yaml", yaml.safe_dump(params))

    def start(self, *words: str, **options: object) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "flows.compress", *words],
            cwd=self.root,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,  # type: ignore[call-overload]
        )

    def flow(self, *words: str, timeout: float = 120) -> "Ended":
        process = self.start(*words)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
            raise
        return Ended(process.returncode, out, err)

    def times(self) -> dict[str, tuple[float, float]]:
        """When each stage that ran since the last `forget` began and ended, in seconds."""
        path = self.work / "times.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        return {name: (float(began), float(ended)) for name, began, ended in map(str.split, lines)}

    def forget(self) -> None:
        """Forgets which stages ran."""
        for path in [self.work / "times.txt", *self.work.glob("*.started")]:
            path.unlink(missing_ok=True)


class Ended:
    """A flow run that has ended, with its table read back."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        rows = re.findall(r"^│ (\S+) +│ (\w+) +│ +(\S+) │ +(.+?) │$", out, flags=re.MULTILINE)
        self.states = {name: state for name, state, _, _ in rows}
        self.sizes = {name: size for name, _, _, size in rows}

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"
