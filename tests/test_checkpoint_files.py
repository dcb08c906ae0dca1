"""Checkpoint files that arrive damaged, are read by many threads, or hold more than tensors."""

import collections
import contextlib
import datetime
import decimal
import enum
import hashlib
import http.server
import importlib
import io
import os
import pathlib
import re
import threading
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effnet_kernels.models.weights.download import download, read_checkpoint

SUFFIXES = (".pth", ".legacy.pth", ".safetensors")


def checkpoint_bytes(suffix: str, contents: Any = None) -> bytes:
    contents = {"x": torch.arange(500.0)} if contents is None else contents
    if suffix == ".safetensors":
        return pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save(contents)
    file = io.BytesIO()
    torch.save(contents, file, _use_new_zipfile_serialization=suffix == ".pth")
    return file.getvalue()


def write(path: Path, contents: Any, legacy: bool = False) -> Path:
    path.write_bytes(checkpoint_bytes(".legacy.pth" if legacy else ".pth", contents))
    return path


# Downloads


class Server:
    """Answers every path with what is set: bytes, and the length that is announced."""

    def __init__(self) -> None:
        self.body, self.length, self.chunked, self.asked = b"", None, False, 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                self.send_response(200)
                if server.length is not None:
                    self.send_header("Content-Length", str(server.length))
                if server.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                # A chunked body without its last chunk was cut.
                size = f"{len(server.body):x}\r\n".encode()
                self.wfile.write(size + server.body + b"\r\n" if server.chunked else server.body)

            def log_message(self, *_: Any) -> None:
                pass

        Handler.protocol_version = "HTTP/1.1"
        Handler.close_connection = True  # type: ignore[assignment]
        self.httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"
        threading.Thread(target=self.httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, body: bytes, length: int | None = None, chunked: bool = False) -> None:
        self.body, self.length, self.chunked = body, length, chunked


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.httpd.shutdown()
    server.httpd.server_close()


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def with_digest(suffix: str) -> tuple[bytes, str]:
    """A checkpoint and its digest, which is not of decimal digits alone: that would be taken for a date."""
    for salt in range(9):
        data = checkpoint_bytes(suffix, {"x": torch.arange(500.0), "salt": torch.tensor(salt)})
        digest = hashlib.sha256(data).hexdigest()[:8]
        if not digest.isdecimal():
            break
    return data, digest


NAMES = {
    "no digest": lambda digest, suffix: (f"model{suffix}", True),
    "a date": lambda digest, suffix: (f"model-20240131{suffix}", True),
    "a digest": lambda digest, suffix: (f"model-{digest}{suffix}", True),
    "a digest, unchecked": lambda digest, suffix: (f"model-{digest}{suffix}", False),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("how", ["announced", "unannounced", "chunked"])
def test_a_cut_download_is_not_kept(server: Server, hub: Path, suffix: str, name: str, how: str) -> None:
    whole, digest = with_digest(suffix)
    path, check_hash = NAMES[name](digest, "." + suffix.rpartition(".")[2])
    url = f"{server.url}/{path}"
    for keep in (0, 1, 10, 100, len(whole) // 2, len(whole) - 1):
        server.answer(whole[:keep], len(whole) if how == "announced" else None, how == "chunked")
        with pytest.raises((OSError, ValueError), match=re.escape(url)):
            download(url, progress=False, check_hash=check_hash)
        assert list(hub.iterdir()) == []
    server.answer(whole, len(whole))
    cached, asked = download(url, progress=False, check_hash=check_hash), server.asked
    assert torch.equal(read_checkpoint(cached)["x"], torch.arange(500.0))
    assert download(url, progress=False, check_hash=check_hash) == cached
    assert server.asked == asked
    assert list(hub.iterdir()) == [cached]


def zipped() -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "not a checkpoint")
    return file.getvalue()


PAGES = {
    "captive portal": b"<!DOCTYPE html><html><body>Please log in</body></html>",
    "json": b'{"error": "rate limit exceeded"}',
    "text": b"content is no longer here\nsorry\n",
    "nothing": b"",
    "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 20\n",
    "another archive": zipped(),
    "a list": checkpoint_bytes(".pth", [torch.zeros(1)]),
    "zeros": bytes(1000),
    "noise": bytes(range(256)) * 4,
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors", ""])
@pytest.mark.parametrize("page", PAGES)
def test_what_is_no_checkpoint_is_not_kept(server: Server, hub: Path, page: str, suffix: str) -> None:
    url = f"{server.url}/model{suffix}"
    server.answer(PAGES[page], len(PAGES[page]))
    with pytest.raises(ValueError, match=re.escape(f"{url}: what was downloaded begins with {PAGES[page][:20]!r}")):
        download(url, progress=False)
    assert list(hub.iterdir()) == []


def test_a_reader_that_is_missing_is_named_before_the_download(
    server: Server, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    asked = server.asked
    with pytest.raises(ModuleNotFoundError, match=r'pip install "effnet-kernels\[safetensors\]"'):
        download(f"{server.url}/model.safetensors", progress=False)
    assert server.asked == asked


# Threads


class Mine:
    """A class that a user allows."""


@pytest.fixture
def safe_globals() -> Iterator[set[Any]]:
    """What is allowed in this process, restored after the test."""
    before = torch.serialization.get_safe_globals()
    yield set(before)
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("legacy", [False, True])
def test_reading_leaves_the_processs_safe_globals_alone(tmp_path: Path, safe_globals: set[Any], legacy: bool) -> None:
    path = write(tmp_path / "a.pth", {"model": {"x": torch.ones(2)}, "args": Namespace(lr=0.1)}, legacy)
    for allowed in ([], [Mine], [Namespace], [Mine, Namespace]):
        with torch.serialization.safe_globals(allowed):
            assert torch.equal(read_checkpoint(path)["model"]["x"], torch.ones(2))
            assert set(torch.serialization.get_safe_globals()) == {*safe_globals, *allowed}


def test_threads_read_without_disturbing_each_other(tmp_path: Path, safe_globals: set[Any]) -> None:
    contents = {"state_dict": {"x": torch.ones(2)}, "args": Namespace(lr=0.1, inner=Namespace(depth=2))}
    paths = [write(tmp_path / f"{legacy}.pth", contents, legacy) for legacy in (False, True)]
    paths.append(write(tmp_path / "mine.pth", {"x": torch.ones(2), "mine": Mine()}))
    with torch.serialization.safe_globals([Mine]), ThreadPoolExecutor(6) as pool:
        read = list(pool.map(read_checkpoint, paths * 100))
        assert set(torch.serialization.get_safe_globals()) == {*safe_globals, Mine}
    assert all(torch.equal(found.get("state_dict", found)["x"], torch.ones(2)) for found in read)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_namespace_keeps_its_attributes(tmp_path: Path, legacy: bool) -> None:
    words = {"text": "cargparse\nNamespace\n", "x": torch.arange(3), "again": Namespace()}
    contents = {"args": Namespace(lr=0.1, deep={"a": [Namespace(b=2)]}), **words}
    found = read_checkpoint(write(tmp_path / "a.pth", contents, legacy))
    assert found["args"].lr == 0.1
    assert found["args"].deep["a"][0].b == 2
    assert found["text"] == words["text"]
    assert torch.equal(found["x"], torch.arange(3))


# Other objects


class Colour(enum.Enum):
    RED = 1


FOREIGN: dict[str, Callable[[], Any]] = {
    "numpy scalar": lambda: np.float64(0.5),
    "numpy integer": lambda: np.int64(3),
    "numpy boolean": lambda: np.bool_(True),
    "numpy array": lambda: np.arange(3),
    "numpy dtype": lambda: np.dtype("float32"),
    "path": lambda: pathlib.PurePosixPath("a/b"),
    "defaultdict": lambda: collections.defaultdict(list, a=[1]),
    "deque": lambda: collections.deque([1]),
    "date": lambda: datetime.datetime(2024, 1, 31),
    "duration": lambda: datetime.timedelta(3),
    "decimal": lambda: decimal.Decimal(1),
    "enum": lambda: Colour.RED,
    "simple namespace": lambda: types.SimpleNamespace(a=1),
    "frozenset": lambda: frozenset([1]),
    "slice": lambda: slice(1),
    "module": lambda: torch.nn.Linear(1, 1),
    "function": lambda: os.path.join,
}


def allow(names: str) -> None:
    """What a user does who follows the message."""
    for name in filter(None, names.split(", ")):
        module, _, attribute = name.rpartition(".")
        torch.serialization.add_safe_globals([getattr(importlib.import_module(module or "builtins"), attribute)])


@pytest.mark.parametrize("place", ["beside", "inside", "first"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.usefixtures("safe_globals")
def test_other_objects_are_named_with_the_remedy(tmp_path: Path, kind: str, legacy: bool, place: str) -> None:
    value, weights = FOREIGN[kind](), {"x": torch.ones(2)}
    contents = {
        "beside": {"state_dict": weights, "value": value, "args": Namespace(a=1)},
        "inside": {"state_dict": weights, "args": Namespace(deep=[{"value": value}])},
        "first": {"value": value, "state_dict": weights},
    }[place]
    path = write(tmp_path / "a.pth", contents, legacy)
    # Each message names what is found so far: numpy's dtypes come to light when what makes them is allowed.
    for _ in range(4):
        with pytest.raises(ValueError, match=rf"^{path}: expected tensors and plain data") as caught:
            read_checkpoint(path)
        message = str(caught.value)
        assert "torch.load(path, weights_only=False) and save its state dict alone" in message
        if kind in ("module", "function", "defaultdict", "deque"):
            # It takes more classes than a user would allow, or what torch reads in no case.
            return
        remedy = re.search(r"add_safe_globals\(\[(.+?)\]\)", message)
        assert remedy is not None, message
        allow(remedy[1])
        with contextlib.suppress(ValueError):
            assert torch.equal(read_checkpoint(path)["state_dict"]["x"], torch.ones(2))
            return
    pytest.fail(f"the remedy did not help: {message}")
