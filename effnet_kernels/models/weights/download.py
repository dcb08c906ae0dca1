"""Checkpoint files: downloaded, verified, read."""

import contextlib
import hashlib
import http.client
import io
import os
import pickle
import pickletools
import re
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch


def download(url: str, progress: bool = True, check_hash: bool = True) -> Path:
    """The checkpoint behind a URL, in torch hub's cache (``torch.hub.get_dir()/checkpoints``).

    A download lands under a temporary name, and is moved in place when it is complete, verified and could be read.

    Raises:
        OSError: the download failed or was cut.
        ValueError: the file, downloaded now or before, does not have the SHA-256 that its name says; or the download
            is not a checkpoint that :func:`read_checkpoint` reads, such as a web page.
        ModuleNotFoundError: reading it needs a package that is not installed.
    """
    name = Path(urlparse(url).path).name
    digest = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    if digest is None:
        # Without a digest many checkpoints share a name, such as model.safetensors.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    # Eight decimal digits are more likely a date than a digest.
    expected = digest[1] if digest is not None and check_hash and not digest[1].isdecimal() else None
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file():
        if expected is not None and (damage := damage_of(path, expected)):
            raise ValueError(f"{path}: damaged, {damage}; delete it to download it again")
        return path
    if path.suffix == ".safetensors":
        _safetensors_reader(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.partial{path.suffix}")
    try:
        try:
            _fetch(url, partial, progress)
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"{url}: the download failed ({error})") from error
        if expected is not None and (damage := damage_of(partial, expected)):
            raise ValueError(f"{url}: the download is damaged ({damage})")
        try:
            read_checkpoint(partial)
        except ValueError as error:
            with partial.open("rb") as file:
                begin = file.read(20)
            reason = str(error).removeprefix(f"{partial}: ")
            raise ValueError(f"{url}: what was downloaded begins with {begin!r} and was not kept: {reason}") from error
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path, progress: bool) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "effnet_kernels"})
    with urllib.request.urlopen(request) as response, path.open("xb") as file:
        announced = response.headers.get("Content-Length", "")
        size = int(announced) if announced.isdecimal() else None
        # torch's own bar, which is nothing where tqdm is not installed.
        options = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
        with torch.hub.tqdm(total=size, disable=not progress, **options) as bar:
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
        # A connection that ends early is no error to urllib.
        if size is not None and file.tell() != size:
            raise OSError(f"cut, expected {size} bytes, got {file.tell()}")


def damage_of(path: Path, expected: str) -> str | None:
    """What is wrong with a file whose SHA-256 should begin with ``expected``, or None."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    found = sha256.hexdigest()[: len(expected)]
    return None if found == expected else f"expected a SHA-256 that begins with {expected}, got {found}"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a ``.safetensors`` file, or of a pickle of tensors and plain data, on the CPU.

    Objects that ``torch.serialization.add_safe_globals`` allows are plain data too. An ``argparse.Namespace``, in which
    timm's checkpoints keep their arguments, comes as an OrderedDict with its attributes unless it is allowed there.

    Raises FileNotFoundError; ValueError, with the path, for a damaged file and for a pickle of other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    # A file that cannot be opened raises its own error here; torch reports damaged files as an OSError too.
    path.open("rb").close()
    try:
        checkpoint = _safetensors_reader(path)(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if re.search("GLOBAL|Can only|unrecognized function", str(error)):
            raise ValueError(f"{path}: {_foreign_objects(path, str(error))}") from error
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint, truncated or of another format ({reason})") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(checkpoint).__name__}")
    return dict(checkpoint)


def _safetensors_reader(source: str | Path) -> Callable[[Path], dict[str, Any]]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{source}: reading it needs safetensors: pip install "effnet-kernels[safetensors]"', name="safetensors"
        ) from error
    return load_file


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "argparse.Namespace" not in str(error):
            raise
    return torch.load(_without_namespaces(path), map_location="cpu", weights_only=True)


def _without_namespaces(path: Path) -> io.BytesIO:
    """A copy of a checkpoint with OrderedDicts in the places of Namespaces, holding their attributes.

    torch can be told that a Namespace is plain data, but only for all threads of the process.
    """
    copy = io.BytesIO()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
            for name in source.namelist():
                record = source.read(name)
                target.writestr(name, _rename_namespaces(record, 1) if name.endswith("/data.pkl") else record)
    else:
        # Before torch 1.6: three pickles about the file and the machine, and the checkpoint.
        copy.write(_rename_namespaces(path.read_bytes(), 4))
    copy.seek(0)
    return copy


def _rename_namespaces(data: bytes, pickles: int) -> bytes:
    file, parts, start = io.BytesIO(data), [], 0
    for _ in range(pickles):
        for operation, argument, position in pickletools.genops(file):
            if operation.name == "GLOBAL" and argument == "argparse Namespace" and position is not None:
                parts += [data[start:position], b"ccollections\nOrderedDict\n"]
                start = position + len(b"cargparse\nNamespace\n")
    return b"".join([*parts, data[start:]])


def _foreign_objects(path: Path, error: str) -> str:
    """The message about a pickle with other objects than tensors and plain data: their names, and the ways out."""
    names = {name for pair in re.findall(r"GLOBAL (\S+)|<class '([\w.]+)'>", error) for name in pair if name}
    # torch lists the objects of files since torch 1.6; for older files the error names the first one.
    with contextlib.suppress(Exception):
        names |= set(torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path)))
    found = ", ".join(sorted(name.removeprefix("builtins.") for name in names - {"argparse.Namespace"}))
    # torch reads no items of other containers, such as a defaultdict, even where their class is allowed.
    allowable = re.search("Can only (SET|APPEND|append)", error) is None
    allow = f"allow them with torch.serialization.add_safe_globals([{found}]), or " if allowable else ""
    return (
        f"expected tensors and plain data, got other objects, which could run code: {found}. If you trust the file, "
        f"{allow}load it with torch.load(path, weights_only=False) and save its state dict alone"
    )
