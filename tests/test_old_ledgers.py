"""Ledgers written by commit 6909f81, one of each kind, still give the same weights.

The fingerprints hold on processors with fused multiply-add (AVX2 and AVX-512 give the
same bits; without it, at SSE 4.2, they differ).
"""

from pathlib import Path

import jax
import pytest

from jes import export
from jes.errors import InputError
from jes.models.weights import fingerprint

pytestmark = pytest.mark.usefixtures("optimised")
LEDGERS = sorted((Path(__file__).parent / "ledgers").glob("*.jsonl"))


@pytest.mark.parametrize("path", LEDGERS, ids=lambda path: path.stem)
def test_gives_the_same_weights(path: Path) -> None:
    ledger = export.read_ledger(path)
    assert ledger.header["evolution"]["law"] in ("normal", "table")
    written, said = ledger.header["versions"]["jax"], ""
    try:
        rebuilt = export.rebuild(ledger)
    except InputError as error:
        said = str(error)
    if not said:
        assert fingerprint(rebuilt.params) == ledger.fingerprints[5]
        return
    # Another compiler may round otherwise, and the message says which it was.
    assert written.rsplit(".", 1)[0] != jax.__version__.rsplit(".", 1)[0], said
    assert f"jax {written} then, {jax.__version__} now" in said
