"""Strictness for all tests: what could hide a mistake is an error."""

import os
import pathlib
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import jax
import pytest
import small_run

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Drops what a file of tests has compiled.

    A program takes memory maps of its own, of which a process may have 65,530 (on
    Linux): with those of all tests, the compiler crashes.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a random model that is quick to compile."""
    return small_run.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def finished_run(
    tmp_path_factory: pytest.TempPathFactory, small_model: pathlib.Path
) -> pathlib.Path:
    """The folder of a small run that nothing disturbed; not to be changed."""
    from jes import train

    workdir = tmp_path_factory.mktemp("runs") / "finished"
    train.run(small_run.get_config(str(small_model)), workdir)
    return workdir


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where processes that tests start keep compiled programs for each other."""
    return tmp_path_factory.mktemp("compiled")
