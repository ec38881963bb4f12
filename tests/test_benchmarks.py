"""The benchmarks that need neither a GPU nor another project's files."""

import json

import pytest


@pytest.mark.slow
def test_an_update_is_the_update_written_plainly(capsys):
    """Losses, weights and averaged weights, over accumulation, clipping and conditioning dropout."""
    from benchmarks import equivalence

    equivalence.main(["--updates=3", "--dropout=0.25"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["plain"]
    assert found["loss"] < 1e-5 and found["weights"] < 1e-5 and found["averaged_weights"] < 1e-5
