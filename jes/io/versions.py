"""What the numbers of a run can depend on beside its settings: versions, the device."""

import platform
from collections.abc import Mapping
from importlib.metadata import distributions, version

import jax

PACKAGES = ("jes", "jax", "jaxlib", "flax", "optax", "numpy", "transformers")


def versions() -> dict[str, str]:
    """Versions of the packages that compute, of Python, and the kind of device."""
    return {
        **{name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def changed_since(before: Mapping[str, str]) -> str:
    """What of `versions` was another then, in words; '' if nothing was."""
    now = versions()
    changed = [
        f"{name} {then} then, {now.get(name)} now"
        for name, then in before.items()
        if now.get(name) != then
    ]
    return "; ".join(changed)


def constraints() -> str:
    """All packages that are installed, but for this one, for `pip install -c FILE`."""
    found = {x.metadata["Name"].lower(): x.version for x in distributions()}
    found.pop("jes", None)
    return "".join(f"{name}=={found[name]}\n" for name in sorted(found))
