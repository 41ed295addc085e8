"""docs/refusals.md has the current error messages."""

import sys

import pytest
from refusals import PAGE, page


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="the json module has other messages since 3.13")
def test_the_page_is_up_to_date():
    """Run `python tests/data/refusals.py` after changing a message."""
    assert PAGE.read_text(encoding="utf-8") == page()
