# SPDX-License-Identifier: Apache-2.0
"""Messages of other libraries' errors, for lines of our own."""

from __future__ import annotations

import pytest

from minbert_fast.common.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [("no network\nlong advice", "no network"), ("\n  no   network\nlong advice", "no network"), ("", "OSError")],
)
def test_the_first_line_of_a_message_says_something(message: str, line: str) -> None:
    assert first_line(OSError(message)) == line
