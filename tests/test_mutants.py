"""`make mutants` takes hours, and nobody sees at once that a mutant's text has gone; this does."""

from pathlib import Path

import pytest
from mutants import MUTANTS, ROOT


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_one_place_of_the_source_and_a_test_that_exists(mutant):
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    path, *name = mutant.test.split("::")
    text = Path(ROOT / path).read_text()
    assert all(f"def {part.split('[')[0]}(" in text for part in name)
