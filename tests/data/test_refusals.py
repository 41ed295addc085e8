"""docs/refusals.md is what the code says."""

import sys

import pytest
from refusals import PAGE, page


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the json module says some things in other words since 3.13")
def test_the_page_is_true():
    """Run `python tests/data/refusals.py` after changing a message."""
    assert PAGE.read_text(encoding="utf-8") == page()
