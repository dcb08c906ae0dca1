"""Checkpoint files: downloaded, verified, read."""

import argparse
import hashlib
import http.client
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch


def download(url: str, progress: bool = True, check_hash: bool = True) -> Path:
    """The file behind a URL, in torch hub's cache (``torch.hub.get_dir()/checkpoints``).

    A download lands under a temporary name and is moved in place when it is complete and verified.

    Raises:
        OSError: the download failed.
        ValueError: the file, downloaded now or before, has not the SHA-256 that its name says.
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
        if expected is not None:
            _verify(path, expected)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), expected, progress=progress)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: the download failed ({error})") from error
    except RuntimeError as error:
        raise ValueError(f"{url}: the download is damaged ({error})") from error
    return path


def _verify(path: Path, expected: str) -> None:
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    if not sha256.hexdigest().startswith(expected):
        found = sha256.hexdigest()[: len(expected)]
        raise ValueError(f"{path}: damaged, expected a SHA-256 that begins with {expected}, got {found}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of a ``.safetensors`` file, or of a pickle of tensors and plain data, on the CPU.

    Raises FileNotFoundError; ValueError, with the path, for a damaged file and for a pickle of other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such checkpoint")
    # What cannot be opened has its own error; torch reports damaged files as an OSError too.
    path.open("rb").close()
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        # timm's training checkpoints hold their arguments as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if re.search("Unsupported (global|class)|GLOBAL", str(error)):
            raise ValueError(
                f"{path}: expected tensors and plain data, got other objects, which could run code"
            ) from error
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a readable checkpoint, truncated or of another format ({reason})") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path}: expected a state dict, got {type(checkpoint).__name__}")
    return dict(checkpoint)


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{path}: reading it needs safetensors: pip install "effnet-kernels[safetensors]"', name="safetensors"
        ) from error
    return load_file(path)
