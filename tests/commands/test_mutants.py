"""experiments/mutants.py: the list of faults matches the current code."""

from experiments.mutants import MUTANTS
from helpers import ROOT


def test_every_mutant_still_applies():
    """A mutant's code occurs exactly once in its file, and the tests that it names exist."""
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text()
        assert source.count(mutant.old) == 1, mutant.about
        for name in mutant.tests.split():
            assert (ROOT / name).exists(), name
