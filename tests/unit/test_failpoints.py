"""The failpoints of tests/system are at places that exist, and each has a name of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.system.failpoints import PLACES, Failpoints, missing


def test_every_place_is_there() -> None:
    assert missing() == [], "renamed? then rename it in tests/system/failpoints.py"


def test_names_are_unique() -> None:
    names = Counter(name for places in PLACES.values() for place in places for name in (place.before, place.after))
    assert set(names.values()) == {1}


def test_an_unknown_name_cannot_be_armed(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        Failpoints("controller_svc", tmp_path / "f").arm("before-script", "kill")
