"""docs/support.md says what the tests find."""

from pathlib import Path

from tests.tools.support_table import support_page

PAGE = Path(__file__).parents[2] / "docs" / "support.md"


def test_support_page_is_up_to_date():
    assert PAGE.read_text() == support_page(), "run `python -m tests.tools.support_table > docs/support.md`"
