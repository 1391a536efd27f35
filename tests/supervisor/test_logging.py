"""What the log shows, what it never shows, and what nobody can make it show."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import RefusedError
from supervisor.logging import LogControl


class Sink(io.StringIO):
    """Remembers each write."""

    def __init__(self, *, terminal=False):
        super().__init__()
        self.writes = []
        self.terminal = terminal

    def write(self, text):
        self.writes.append(text)
        return len(text)

    def isatty(self):
        return self.terminal


def fail(text):
    """An error about one thing, while something else is in a local variable."""
    assert text
    raise ValueError(text[text.index("-----") :] if "-----" in text else text)


@pytest.fixture
def open_log():
    controls = []

    def make(**more):
        sink = more.pop("sink", None) or Sink()
        control = LogControl("gate", sink=sink, **more)
        controls.append(control)
        return control, sink

    yield make
    for control in controls[-1:]:  # each one has replaced those before
        control.close()


def test_a_text_record_is_one_line_in_one_write(open_log):
    control, sink = open_log()
    control.logger.bind(message="api:1:7", peer="12D3Koo", rule="allowed").info("let {} in", "bob")
    [line] = sink.writes
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info     gate: let bob in"
        r" \[message=api:1:7 peer=12D3Koo rule=allowed\]\n",
        line,
    )


def test_a_json_record_is_one_object(open_log):
    control, sink = open_log(json=True)
    control.logger.bind(message="api:1:7", count=3).warning("odd\nthing")
    [line] = sink.writes
    entry = json.loads(line)
    del entry["time"]
    assert entry == {"level": "warning", "actor": "gate", "message": "api:1:7", "count": 3, "text": "odd\nthing"}
    assert line.endswith("}\n")
    assert line.count("\n") == 1


def test_the_level_changes_while_running(open_log):
    control, sink = open_log(level="warning")
    log = control.logger
    log.info("no")
    control.set_level("debug")
    log.debug("yes")
    control.set_level("error")
    log.warning("no")
    assert len(sink.writes) == 1
    with pytest.raises(RefusedError) as refused:
        control.set_level("loud")
    assert refused.value.code == "invalid-level"
    log.error("still there")
    assert len(sink.writes) == 2


@given(st.text())
def test_no_text_forges_a_line_or_drives_the_terminal(text):
    sink = Sink()
    control = LogControl("gate", sink=sink)
    control.logger.bind(peer=text).info("got {}", text)
    control.close()
    [line] = sink.writes
    assert line[:-1].isprintable()
    assert line.endswith("\n")


@given(st.text())
def test_no_text_breaks_a_json_line(text):
    sink = Sink()
    control = LogControl("gate", sink=sink, json=True)
    control.logger.bind(peer=text).info("got {}", text)
    control.close()
    [line] = sink.writes
    assert line.isascii()
    assert line.count("\n") == 1
    assert json.loads(line)["actor"] == "gate"


@pytest.mark.parametrize("as_json", [False, True])
def test_secrets_do_not_appear(open_log, as_json):
    control, sink = open_log(json=as_json)
    pem = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2Vw\n-----END PRIVATE KEY-----"
    log = control.logger.bind(private_key="MC4CAQ", password="MC4CAQ", token="MC4CAQ", key="MC4CAQ", raw=b"MC4CAQ")
    log.info("loaded {}", pem)

    secret = "MC4" + "CAQ"  # in pieces, because a traceback shows this very line
    try:
        fail(secret + pem)
    except ValueError as error:
        log.opt(exception=error).error("failed")
    text = "".join(sink.writes)
    assert "MC4CAQ" not in text
    assert "<6 bytes>" in text
    assert "ValueError" in text


def test_a_traceback_follows_its_line_in_the_same_write(open_log):
    control, sink = open_log()
    try:
        fail("bad\n2026-01-01T00:00:00.000Z info     gate: forged")
    except ValueError as error:
        control.logger.opt(exception=error).error("failed")
    [record] = sink.writes
    first, *trace = record.splitlines()
    assert first.endswith("gate: failed")
    assert all(line.startswith("  | ") for line in trace)
    assert trace[-1] == "  | 2026-01-01T00:00:00.000Z info     gate: forged"


def test_colour_only_on_a_terminal_and_without_no_color(open_log, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for terminal, environment, coloured in ((True, None, True), (False, None, False), (True, "1", False)):
        if environment:
            monkeypatch.setenv("NO_COLOR", environment)
        control, sink = open_log(sink=Sink(terminal=terminal))
        control.logger.info("x")
        assert ("\x1b[" in sink.writes[0]) is coloured


def test_a_closed_standard_error_ends_nobody(open_log):
    sink = Sink()
    control, _ = open_log(sink=sink)

    def broken(_):
        raise BrokenPipeError

    sink.write = broken
    control.logger.error("nobody reads this")


def test_long_texts_are_cut(open_log):
    control, sink = open_log()
    control.logger.info("x" * 100_000)
    assert len(sink.writes[0]) < 2200
