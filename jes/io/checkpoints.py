"""Checkpoints with orbax: the weights and optimizer state after some generations.

Of several processes that have the same state one alone saves and restores.
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jes.io.console import console

HALF = re.compile(r"[0-9]+\.orbax-checkpoint-tmp.*")
"""Names that orbax gives to what it is writing."""
KEPT = 2
"""How many checkpoints are kept: if the last is damaged there is one before it."""


def saved(folder: Path) -> list[int]:
    """After how many generations there are checkpoints, the newest first."""
    names = [path.name for path in folder.glob("*/") if path.name.isdigit()]
    return sorted(map(int, names), reverse=True)


def tidy(folder: Path, generations: int) -> None:
    """Deletes half-written checkpoints, and those beyond so many generations.

    What has another name than orbax gives stays, with whatever is in it.
    """
    for path in folder.glob("*"):
        half = HALF.fullmatch(path.name) is not None
        beyond = path.name.isdigit() and int(path.name) > generations
        if path.is_dir() and (half or beyond):
            shutil.rmtree(path)


def save(folder: Path, generations: int, state: Any) -> None:
    """Writes the state after this many generations; returns when it is on disk.

    Raises:
      OSError: if the disk is full or the folder cannot be written.
    """
    try:
        path = (folder / str(generations)).absolute()
        with _quiet():
            if jax.process_count() == 1:
                ocp.save(path, state, overwrite=True)
            else:
                _alone().save(path, jax.tree.map(np.asarray, state), force=True)
    except Exception as error:  # the storage layers below have errors of their own
        tidy(folder, generations)  # half a checkpoint may be what fills the disk
        if isinstance(error, OSError):
            raise
        raise OSError(_first_line(error, 300)) from error
    for old in saved(folder)[KEPT:]:
        shutil.rmtree(folder / str(old))


def _alone() -> Any:
    """Saves and restores NumPy arrays without the other processes.

    The new interface of orbax waits for all of them, whatever its options say; it reads
    what this one writes.
    """
    from orbax.checkpoint import Checkpointer, PyTreeCheckpointHandler, options

    mine = jax.process_index()
    multiprocessing = options.MultiprocessingOptions(
        primary_host=mine,
        active_processes={mine},
        barrier_sync_key_prefix=f"process{mine}",
    )
    handler = PyTreeCheckpointHandler(multiprocessing_options=multiprocessing)
    return Checkpointer(handler, multiprocessing_options=multiprocessing)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences orbax's log of every save, and of errors in each of its threads."""
    # For good: its tasks complain when they are collected, some time later.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def restore_latest(folder: Path, like: Any, at_most: int) -> tuple[int, Any] | None:
    """The newest state that can be read, and after how many generations it was.

    A damaged checkpoint is passed over for the one before it. Nothing is written: the
    run may be going on.

    Args:
      folder: of the checkpoints; it need not exist.
      like: a state with the shapes, dtypes and shardings to restore.
      at_most: newer checkpoints than this many generations are not used.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )

    def read(path: Path) -> Any:
        if jax.process_count() == 1:
            return ocp.load(path, abstract)
        with _quiet():
            values = _alone().restore(path, item=jax.tree.map(np.empty_like, abstract))
        return jax.device_put(values, jax.tree.map(lambda x: x.sharding, abstract))

    for generations in (number for number in saved(folder) if number <= at_most):
        path = (folder / str(generations)).absolute()
        try:
            return generations, read(path)
        except Exception as error:  # orbax raises whatever its storage layers raise
            console.print(
                f"the checkpoint after {generations} generations cannot be read, so an "
                f"earlier state is replayed ({_first_line(error, 100)})"
            )
    return None


def _first_line(error: Exception, length: int) -> str:
    return str(error).strip().partition("\n")[0][:length]
