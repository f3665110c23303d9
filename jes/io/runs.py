"""The run folder: what is in `--workdir`, and whether a run may go on there."""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jes.errors import InputError
from jes.io.metrics import write_json

MAY_CHANGE = ("generations", "eval_every", "checkpoint_every")
"""Settings that a run may be continued with other values of: they decide when it
looks and how long it goes on, not what it computes."""


def versions() -> dict[str, str]:
    """What the numbers of a run can depend on beside its settings."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "transformers")
    return {
        "jes": version("jes"),
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def claim(workdir: Path, config: Mapping[str, Any], resolved: dict[str, Any]) -> Any:
    """Makes the folder this run's, or finds that it is so already.

    Args:
      workdir: the run folder.
      config: all settings.
      resolved: what was chosen by the program where the settings leave it open.

    Returns:
      `resolved` as the run was started with.

    Raises:
      InputError: if the folder belongs to a run with other settings, or holds
        something that is not a run.
    """
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))
    if not path.exists():
        # Anything but what a run killed before this line could have left.
        if workdir.is_dir() and any(f.suffix != ".part" for f in workdir.iterdir()):
            raise InputError(
                f"{workdir} is not empty and holds no run: give another --workdir"
            )
        if workdir.exists() and not workdir.is_dir():
            raise InputError(f"{workdir} is a file; --workdir is a folder")
        workdir.mkdir(parents=True, exist_ok=True)
        record = {"config": config, "resolved": resolved, "versions": versions()}
        write_json(path, record)
        return resolved
    try:
        record = json.loads(path.read_text())
        before, resolved = flat(record["config"]), record["resolved"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the config of a run ({error})") from error
    now = flat(config)
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
    write_json(path, {**record, "config": config})
    return resolved


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one dict with dotted names."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{name}.")
        else:
            out[prefix + name] = value
    return out
