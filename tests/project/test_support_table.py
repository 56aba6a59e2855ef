"""docs/limits.md says what the tests find."""

from tests.tools.docs_sections import read_section
from tests.tools.support_table import support_section


def test_support_section_is_up_to_date():
    shown = read_section("limits.md", "support")
    assert shown == support_section().strip(), "run `python -m tests.tools.support_table`"
