"""Strictness for all tests: what could hide a mistake is an error."""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from importlib.metadata import version

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

# Compiling takes most of the time of the tests. So programs are optimised little, which
# takes half of the time, here and in processes that tests start: with what JAX's own
# tests do, and an older way to emit code, as one module for LLVM.
if version("jaxlib").startswith("0.10."):
    # jaxlib 0.12 stops at flags that it does not know any more, and what it optimises
    # little has other last bits where an update is in place than where it is not.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    os.environ.setdefault(
        "XLA_FLAGS",
        "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    )

import jax
import pytest
import small_run

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)

COMPILED = pathlib.Path(__file__).parents[1] / ".jax_cache"
CPU = pathlib.Path("/proc/cpuinfo")
if CPU.exists() and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers, processes that tests start and later runs share compiled programs. They
    # are made for one kind of CPU, after which the folder is named.
    lines = {
        line
        for line in CPU.read_text().splitlines()
        if line.startswith(("model name", "flags", "Features"))
    }
    kind = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]
    for name, value in {
        "jax_compilation_cache_dir": str(COMPILED / kind),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Deletes the compiled programs of earlier runs once they take up 1 GiB."""
    if not hasattr(session.config, "workerinput"):
        kept = (path.stat().st_size for path in COMPILED.rglob("*-cache"))
        if sum(kept) > 2**30:
            shutil.rmtree(COMPILED)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Drops the compiled programs after a file of tests if they are many.

    Each takes about six memory maps, of which Linux allows a process 65,530. Beyond
    that compilation fails, and writing the program to the cache crashes.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimised() -> Iterator[None]:
    """Programs are optimised: for what computes long, or for bits of old programs.

    Code is emitted in the older way still, which is chosen once for a process.
    """
    name = "jax_disable_most_optimizations"
    known = jax.config.values[name]
    jax.config.update(name, False)
    jax.clear_caches()
    yield
    jax.config.update(name, known)
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
