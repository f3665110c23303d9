"""Checkpoints with orbax: the weights and optimizer state after some generations."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

KEPT = 2
"""How many checkpoints are kept: if the last is damaged there is one before it."""


@contextmanager
def checkpointer(folder: Path) -> Iterator[ocp.training.Checkpointer]:
    """Opens a run's checkpoint folder."""
    # Orbax reports every save through the root logger's absl handler.
    logging.getLogger("absl").setLevel(logging.ERROR)
    keep = ocp.training.preservation_policies.LatestN(KEPT)
    saver = ocp.training.Checkpointer(
        folder.absolute(),
        preservation_policy=keep,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        cleanup_tmp_directories=True,
    )
    try:
        yield saver
    finally:
        saver.close()


def save(saver: ocp.training.Checkpointer, generations: int, state: Any) -> None:
    """Writes the state after this many generations; returns when it is on disk.

    Raises:
      OSError: if the disk is full or the folder cannot be written.
    """
    saver.save(generations, state, overwrite=True)


def restore_latest(
    saver: ocp.training.Checkpointer, like: Any, at_most: int
) -> tuple[int, Any] | None:
    """The newest state that can be read, and after how many generations it was.

    A damaged checkpoint is passed over for the one before it.

    Args:
      saver: the open folder.
      like: a state with the shapes and dtypes to restore.
      at_most: newer checkpoints than this many generations are not used.

    Returns:
      (generations, state), or None where there is none to be had.
    """
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        like,
    )
    for checkpoint in sorted(saver.checkpoints, key=lambda c: -c.step):
        if checkpoint.step > at_most:
            continue
        try:
            return checkpoint.step, saver.load(checkpoint.step, abstract)
        except Exception as error:  # orbax raises whatever its storage layers raise
            reason = str(error).strip().split("\n")[0][:200]
            logging.warning(
                "checkpoint %d cannot be read (%s); using an earlier one",
                checkpoint.step,
                reason,
            )
    return None
