"""Checkpoints that survive: whole or not at all, with a checksum, in the middle of an epoch too."""

import contextlib
import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from effnet_kernels.models.weights.download import damage_of
from effnet_kernels.tools.console import printable, say

# Of the checkpoints to go on from, so many stay: if the newest is damaged, there is one before it.
_KEPT = 2
_NAME = "step-{:09d}.ckpt"
_GLOB = "step-*.ckpt"

# What a shell reports of a process that SIGINT ended.
EXIT_INTERRUPTED = 128 + signal.SIGINT


class Interrupted(Exception):
    """Training was stopped by a signal, after its state was saved.

    Attributes:
        signal: SIGINT or SIGTERM.
        path: the checkpoint.
    """

    def __init__(self, number: int, path: Path) -> None:
        super().__init__(number, path)
        self.signal = number
        self.path = path


class SafeCheckpointIO(CheckpointIO):
    """Writes a checkpoint under another name, syncs it and renames it, with its SHA-256 in a file beside it.

    A process that is killed at any moment leaves the checkpoint that was there, or the new one, and its checksum: while
    the one takes the place of the other, both are in the file beside it. ``sha256sum --check`` reads that file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises OSError where the file cannot be written; what was at ``path`` is then as it was."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        checksums = _checksum_of(path)
        with replacing(path) as file:
            stream = _HashedFile(file, digest)
            try:
                torch.save(checkpoint, cast(IO[bytes], stream))
            except RuntimeError:
                # torch reports a full disk as a fault of its own.
                if stream.error is not None:
                    raise stream.error from None
                raise
            line = f"{digest.hexdigest()}  {path.name}\n".encode()
            before = checksums.read_bytes() if path.exists() and checksums.exists() else b""
            with replacing(checksums) as both:
                both.write(before + line)
        if before:
            with replacing(checksums) as file:
                file.write(line)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint's tensors and plain values, on the CPU; raises ValueError for one that is damaged."""
        if (damage := checkpoint_damage(Path(path))) is not None:
            raise ValueError(f"{path}: {damage}")
        return torch.load(path, map_location="cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the checksum after the checkpoint, which is damaged without it."""
        Path(path).unlink(missing_ok=True)
        _checksum_of(Path(path)).unlink(missing_ok=True)


class _HashedFile:
    """A file for torch.save that hashes what is written and remembers why it could not be."""

    def __init__(self, file: Any, digest: Any) -> None:
        self.file = file
        self.digest = digest
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            self.digest.update(content)
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file that takes the place of ``path`` when all of it is on the disk, and that any exception removes."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} was not written: {error.strerror}") from error
        raise
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _checksum_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def checkpoint_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if its content is what was written."""
    damage: str | None = "cannot be checked: its checksum is missing"
    try:
        # The newest comes last.
        for line in reversed(_checksum_of(path).read_text(encoding="utf-8").splitlines()):
            if (damage := damage_of(path, line.split()[0])) is None:
                break
        return damage
    except (OSError, ValueError, IndexError) as error:
        return f"cannot be checked: {error}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint to go on from, or None; names those that are damaged on stderr."""
    for path in sorted(folder.glob(_GLOB), reverse=True):
        damage = checkpoint_damage(path)
        if damage is None:
            return path
        say(f"effnet: warning: {printable(f'{path}: {damage}; the one before it is used')}", sys.stderr)
    return None


class Checkpoints(Checkpoint):
    """Saves what training goes on from: every so many minutes or steps, after each epoch, and on SIGTERM and SIGINT.

    Then the step, or the validation that runs, is finished first, and training ends with :class:`Interrupted`. A second
    SIGINT ends it at once.

    Args:
        folder: for the checkpoints.
        minutes: at most so much work is lost.
        steps: the same in optimizer steps; None for minutes alone.
    """

    def __init__(self, folder: Path, minutes: float, steps: int | None) -> None:
        self.folder = folder
        self.minutes = minutes
        self.steps = steps
        self.saved_at = time.monotonic()
        self.saved_step = 0
        self.signal = 0
        self.numbers: tuple[int, ...] = ()
        self.others: dict[int, Any] = {}

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT from the first step on; the handlers that were there come back at the end.

        Before that a signal ends the process as ever, and in another thread than the main one none is taken.
        """
        numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.getsignal(number) for number in numbers}
        self.numbers = numbers
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning's, which passes SIGTERM on to the processes that it has started.
        self.others = {number: signal.signal(number, self._notice) for number in self.numbers}

    def _notice(self, number: int, frame: Any) -> None:
        if self.signal == number == signal.SIGINT:
            os._exit(EXIT_INTERRUPTED)
        self.signal = number
        other = self.others[number]
        if number == signal.SIGTERM and callable(other):
            other(number, frame)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # After the last batch of an epoch, its end saves; between the batches of a step, the gradients would be lost.
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if batches % trainer.accumulate_grad_batches != 0 or batches >= trainer.num_training_batches:
            return
        if self._stops(trainer) or self._is_due(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if self.steps is not None and trainer.global_step - self.saved_step >= self.steps:
            return True
        late = time.monotonic() - self.saved_at >= 60 * self.minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def _stops(self, trainer: pl.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(self.signal != 0, all=False)

    def _save(self, trainer: pl.Trainer) -> None:
        path = self.folder / _NAME.format(trainer.global_step)
        trainer.save_checkpoint(path)
        self.saved_at, self.saved_step = time.monotonic(), trainer.global_step
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob(_GLOB))[:-_KEPT]:
                trainer.strategy.remove_checkpoint(old)
        if self._stops(trainer):
            raise Interrupted(self.signal or signal.SIGTERM, path)
