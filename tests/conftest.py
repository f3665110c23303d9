"""Strictness for all tests: what could hide a mistake is an error."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One folder for the workers and processes of this run, which it takes away again.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jes-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)

import jax
import pytest
import small_run

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)


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
def compiled() -> pathlib.Path:
    """Where processes that tests start keep compiled programs for each other."""
    return pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
