# SPDX-License-Identifier: Apache-2.0
"""Messages of other libraries' errors, for lines of our own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from minbert_fast.common import cli
from minbert_fast.common.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [("no network\nlong advice", "no network"), ("\n  no   network\nlong advice", "no network"), ("", "OSError")],
)
def test_the_first_line_of_a_message_says_something(message: str, line: str) -> None:
    assert first_line(OSError(message)) == line


def test_a_file_where_a_directory_is_expected_is_called_one(tmp_path, capsys):
    """`search --output FILE` ended with "FILE: File exists"."""
    (tmp_path / "out").touch()
    assert cli.run(lambda _: (tmp_path / "out").mkdir(exist_ok=True), []) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'}: is a file, expected a directory\n"


def test_output_that_nobody_reads_is_no_success() -> None:
    """`train | head -1` stopped at once with status 0, and a script went on."""
    command = [sys.executable, "-m", "minbert_fast.recipes", "list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout
        assert run.stderr
        run.stdout.close()
        assert (run.stderr.read(), run.wait()) == ("", 128 + signal.SIGPIPE)
