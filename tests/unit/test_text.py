"""Foreign text on a terminal: one line stays one line, and nothing moves the cursor."""

import logging
import sys
from pathlib import Path

import pytest

from vipo.audit.examination import Examination
from vipo.audit.findings import Audit, Checked
from vipo.text import Formatter, message, one_line, shortened, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 赤い, 👩‍🚀, עיגול \u200f", "plain, é, 赤い, 👩‍🚀, עיגול \u200f"),
        ("\x1b[2J\a\r\x9b31m\x7f", "\\x1b[2J\\x07\\x0d\\x9b31m\\x7f"),
        ("a\u202egnp.exe\u2066", "a\\u202egnp.exe\\u2066"),
        ("a\u2028error: b", "a\\u2028error: b"),
        (b"caf\xe9".decode(errors="surrogateescape"), "caf\\udce9"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
    ],
)
def test_what_is_no_sign_is_shown_as_an_escape(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert one_line(text) == shown.replace("\n", "\\n").replace("\t", "\\t")
    visible(text).encode()


def test_only_the_first_line_of_a_message_begins_at_the_margin() -> None:
    assert message("a: wrong\n\nerror: forged\x1b[A\nb") == "a: wrong\n  error: forged\\x1b[A\n  b"


def test_long_messages_keep_their_beginning_and_their_end() -> None:
    told = message("key: " + "x" * 5000 + "; give another one")
    assert told.startswith("key: xx")
    assert told.endswith("; give another one")
    assert len(told) < 1000
    assert shortened("abc", 3) == "abc"
    many = message("\n".join(f"line {number}" for number in range(300)))
    assert len(many.splitlines()) == 21
    assert many.endswith("… and 280 lines more")


def test_log_records_cannot_forge_another_one() -> None:
    record = logging.LogRecord("vipo", logging.WARNING, "", 0, "%s left out", ("a\nerror: \x1b[31mb",), None)
    assert Formatter("%(levelname)s %(message)s").format(record) == "WARNING a\n  error: \\x1b[31mb left out"
    try:
        raise ValueError("\x1b]0;title\a")
    except ValueError:
        record = logging.LogRecord("vipo", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    lines = Formatter("%(message)s").format(record).splitlines()
    assert all(line.startswith("  ") for line in lines[1:])
    assert lines[-1] == "  ValueError: \\x1b]0;title\\x07"


def test_a_file_s_name_cannot_forge_a_verdict(tmp_path: Path) -> None:
    examination = Examination(tmp_path, tmp_path)
    nothing = Checked(files=0, bytes=0, stages=0, configurations=0, numbers=0, unanchored=(), outside=(), reran=None)
    named = Audit(path="a\nb: reproducible", verdict="broken", anchors=(), checked=nothing, findings=())
    assert named.text().startswith("a\\nb: reproducible: broken\n")
    examination.remark("notes\nresults/demo: reproducible\x1b[A", "unknown file", "a\nb", "c\nd")
    [finding] = examination.findings
    assert finding.artifact == "notes\\nresults/demo: reproducible\\x1b[A"
    assert (finding.message, finding.advice) == ("a\\nb", "c\\nd")
