"""The run folder: what is in `--workdir`, and whether a run may go on there."""

import fcntl
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jes.config import default
from jes.errors import InputError
from jes.io.metrics import write_json

MEMORY = (
    "chunk",
    "slots",
    "slice_tokens",
    "memory_gb",
    "devices",
    "model_parallel",
)
MAY_CHANGE = (
    "generations",
    "eval_every",
    "eval_batch",
    "checkpoint_every",
    "share_update",
    *MEMORY,
)
"""Settings that a run may be continued with other values of: they decide when it
looks, how long it goes on, how much memory it takes and on what devices, not what it
computes (beyond the order of sums, for the last)."""


def versions() -> dict[str, str]:
    """What the numbers of a run can depend on beside its settings."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")
    return {
        "jes": version("jes"),
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


@contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Makes the run folder, and keeps other processes from running in it.

    The lock goes with the process, however it ends. A folder that is still empty in
    the end is not left behind.

    Raises:
      InputError: if another process runs in the folder, or it cannot be one.
    """
    made = not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{workdir} cannot be the run folder: {error.strerror}"
        ) from None
    folder = os.open(workdir, os.O_RDONLY)
    try:
        _lock(folder, workdir)
        yield
    finally:
        if made and not any(workdir.iterdir()):
            workdir.rmdir()
        os.close(folder)


def _lock(folder: int, workdir: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another process is running in {workdir}") from None
    except OSError:  # a file system without locks
        pass


def check(workdir: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Looks whether a run with these settings may go on, or start, in the folder.

    Returns:
      What `claim` has written there; None if the run has not started.

    Raises:
      InputError: if the folder belongs to a run with other settings, or holds
        something that is not a run.
    """
    record = recorded(workdir)
    if record is None:
        # Anything but what a run killed before `claim` could have left.
        if any(file.suffix != ".part" for file in workdir.iterdir()):
            raise InputError(
                f"{workdir} is not empty and holds no run: give another --workdir"
            )
        return None
    # What is newer than the folder was as it is by default.
    before = flat(plain(default().to_dict())) | flat(record["config"])
    now = flat(plain(config))
    differing = [
        f"  {name}: {before.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(before | now)
        if before.get(name) != now.get(name) and name not in MAY_CHANGE
    ]
    if differing:
        raise InputError(
            f"{workdir} belongs to a run with other settings:\n"
            + "\n".join(differing)
            + "\ngive another --workdir, or the same settings"
        )
    return record


def claim(
    workdir: Path, config: Mapping[str, Any], resolve: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Makes the folder this run's, or finds that it is so already: see `check`.

    Args:
      workdir: the run folder, which exists.
      config: all settings.
      resolve: chooses what the settings leave open.

    Returns:
      What it chose when the run was started, or now where the settings that it follows
      from have changed.
    """
    record = check(workdir, config)
    if record is None:
        record = {"config": {}, "versions": versions()}
    # What is newer than the folder was as it is by default.
    before, now = plain(default().to_dict()) | record["config"], plain(config)
    changed = any(before.get(name) != now.get(name) for name in MEMORY)
    if changed or "resolved" not in record:
        record["resolved"] = resolve()
    write_json(workdir / "config.json", {**record, "config": now})
    return record["resolved"]


def claim_results(folder: Path, settings: Mapping[str, Any]) -> None:
    """Notes in settings.json what the rows in a folder of results depend on.

    What was not given before, or is not now, is no difference.

    Raises:
      InputError: if there are rows of other settings.
    """
    path = folder / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    differing = [
        f"  {name}: {before[name]!r} there, {settings[name]!r} here"
        for name in sorted(before.keys() & settings.keys())
        if before[name] != settings[name]
    ]
    if differing:
        raise InputError(
            f"{folder} has results of other settings:\n"
            + "\n".join(differing)
            + "\ngive another folder"
        )
    write_json(path, before | plain(settings))


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they come back from JSON."""
    return json.loads(json.dumps(config))


def recorded(workdir: Path) -> dict[str, Any] | None:
    """The contents of a run's config.json; None where there is none.

    Raises:
      InputError: if it is not one.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        if not {"config", "resolved", "versions"} <= record.keys():
            raise ValueError("entries are missing")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the config of a run ({error})") from error
    return record


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted names."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
