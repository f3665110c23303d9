"""Compiled programs, kept on disk for the next process that needs the same."""

import os
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Makes JAX keep what it compiles for an accelerator in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder, also on CPUs, and
    `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing. What took less than a second to
    compile is not kept. On CPUs nothing is unless asked for: such programs are made for
    one kind of processor, and a home folder may serve machines with several.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.default_backend() == "cpu":
        return
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(caches).expanduser() / "jes" / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return  # nowhere to keep them, or no home
    jax.config.update("jax_compilation_cache_dir", str(folder))
