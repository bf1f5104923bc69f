"""The tests of the guarantee notice an engine that skips a sync, a checksum or a reference count."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from mutants import ENGINE, MUTANTS, Mutant, broken, caught_by


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_line_to_break_is_still_there(mutant: Mutant) -> None:
    assert broken(mutant) != (ENGINE / mutant.file).read_text()
    compile(broken(mutant), mutant.file, "exec")


@pytest.mark.parametrize("mutant", MUTANTS[:3], ids=lambda mutant: mutant.name)
def test_a_broken_engine_is_noticed(mutant: Mutant) -> None:
    assert caught_by(mutant)
