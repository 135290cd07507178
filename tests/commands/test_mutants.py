"""experiments/mutants.py: the list of faults keeps up with the code."""

from experiments.mutants import MUTANTS
from helpers import ROOT


def test_every_mutant_still_applies():
    """Its code is in its file exactly once, and the tests that it names are there."""
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text()
        assert source.count(mutant.old) == 1, mutant.about
        for name in mutant.tests.split():
            assert (ROOT / name).exists(), name
