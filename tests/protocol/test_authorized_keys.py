from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.authorized_keys import (
    MAX_COMMENT,
    MAX_FILE,
    MAX_LINE,
    AuthorizedKeys,
    AuthorizedKeysError,
    check_comment,
    format_expires,
    parse_expires,
)
from protocol.keys import PrivateKey
from protocol.peer_id import PeerId

ANNA, BORIS, CARLA = (PrivateKey.from_seed(bytes((number,)) * 32).peer_id for number in range(3))

# As peer-up writes it: a header, a line as `auth add` appends it, one after verify and pairing, one by hand.
FILE = f"""# authorized_keys - Peer ID allowlist (one per line)
# Format: <peer_id> # optional comment

{ANNA}  # laptop
{BORIS}\tverified=sha256:0a1b2c3d  group=89abcdef hmac_proof={"0f" * 32}   # home-server
  {CARLA} expires=2026-12-24T18:00:00+01:00 colour=blue
""".encode()


def parse(text):
    return AuthorizedKeys.parse(text.encode() if isinstance(text, str) else text)


def test_a_file_as_peer_up_writes_it():
    keys = parse(FILE)
    assert keys.problems == ()
    assert [(entry.line, entry.peer, entry.comment) for entry in keys.entries] == [
        (4, ANNA, "laptop"),
        (5, BORIS, "home-server"),
        (6, CARLA, ""),
    ]
    boris, carla = keys.find(BORIS), keys.find(CARLA)
    assert boris.attributes == (("verified", "sha256:0a1b2c3d"), ("group", "89abcdef"), ("hmac_proof", "0f" * 32))
    assert boris.verified == "sha256:0a1b2c3d"
    assert boris.expires is None
    assert carla.expires == 1798131600.0
    assert carla.attribute("colour") == "blue"
    assert carla.attribute("group") is None
    assert carla.verified is None
    assert [(rule.peer, rule.line, rule.expires, rule.comment) for rule in keys.rules()] == [
        (ANNA, 4, None, "laptop"),
        (BORIS, 5, None, "home-server"),
        (CARLA, 6, 1798131600.0, ""),
    ]


def test_edits_touch_their_line_alone():
    keys = parse(FILE)
    lines = FILE.splitlines(keepends=True)
    dora = PrivateKey.from_seed(b"d" * 32).peer_id
    assert keys.add(dora, "her phone", {"group": "01234567"}).to_bytes() == (
        FILE + f"{dora} group=01234567 # her phone\n".encode()
    )
    assert keys.remove(BORIS).to_bytes() == b"".join(lines[:4] + lines[5:])
    edited = keys.set_attribute(BORIS, "group", "00000000").to_bytes()
    assert edited == FILE.replace(b"group=89abcdef", b"group=00000000")
    added = keys.set_attribute(BORIS, "expires", "2030-01-01T00:00:00Z").to_bytes()
    assert added == FILE.replace(b"   # home", b" expires=2030-01-01T00:00:00Z   # home")
    taken = keys.set_attribute(BORIS, "group", None).to_bytes()
    assert taken == FILE.replace(b"  group=89abcdef", b"")
    assert keys.set_attribute(BORIS, "nothing", None).to_bytes() == FILE
    assert keys.set_attribute(ANNA, "verified", "sha256:00000000").to_bytes() == FILE.replace(
        f"{ANNA}  #".encode(), f"{ANNA} verified=sha256:00000000  #".encode()
    )
    assert keys.set_comment(ANNA, "tablet").to_bytes() == FILE.replace(b"  # laptop", b" # tablet")
    assert keys.set_comment(ANNA, "").to_bytes() == FILE.replace(b"  # laptop", b"")


def test_a_last_line_without_its_end_gets_one_before_another_follows():
    keys = parse(f"{ANNA}").add(BORIS)
    assert keys.to_bytes() == f"{ANNA}\n{BORIS}\n".encode()
    assert parse("").add(BORIS).to_bytes() == f"{BORIS}\n".encode()


def test_windows_line_ends_and_byte_order_marks_are_kept():
    data = f"\ufeff{ANNA} # one\r\n{BORIS} group=01234567\r\n".encode()
    keys = parse(data)
    assert keys.problems == ()
    assert keys.find(ANNA).comment == "one"
    assert keys.find(BORIS).attribute("group") == "01234567"
    assert keys.set_attribute(ANNA, "group", "89abcdef").to_bytes() == data.replace(b" # one", b" group=89abcdef # one")
    assert keys.add(CARLA).to_bytes() == data + f"{CARLA}\r\n".encode()


BROKEN = {
    "nonsense": "bad-peer-id",
    f"{ANNA}x": "bad-peer-id",
    f"{ANNA} {BORIS}": "bad-attribute",
    f"{ANNA} laptop": "bad-attribute",
    f"{ANNA} =x": "bad-attribute",
    f"{ANNA} a=1 a=2": "duplicate-attribute",
    f"{ANNA} expires=tomorrow": "bad-expires",
    f"{ANNA} expires=": "bad-expires",
    f"{ANNA} expires=2026-02-30T00:00:00Z": "bad-expires",
    f"{ANNA} expires=2026-12-24": "bad-expires",
    f"{ANNA} expires=2030-01-01T00:00:00Z expires=2040-01-01T00:00:00Z": "duplicate-attribute",
    f"{ANNA}\x00": "control-character",
    f"{ANNA}\ra=b": "control-character",
    f"{ANNA}\u202e a=b": "control-character",
    f"{ANNA}\u00a0a=b": "bad-peer-id",
    f"{ANNA} # " + "x" * MAX_LINE: "line-too-long",
    f"{ANNA} # \udcff": "not-utf-8",
    f"{ANNA} a=\udcff": "not-utf-8",
}


@pytest.mark.parametrize(("line", "code"), BROKEN.items())
def test_broken_lines_are_reported_and_decide_nothing(line, code):
    data = f"# header\n{BORIS}\n{line}\n{CARLA}\n".encode("utf-8", "surrogateescape")
    keys = parse(data)
    assert [(problem.line, problem.code, problem.fatal) for problem in keys.problems] == [(3, code, True)]
    assert keys.fatal_problems == keys.problems
    assert keys.problems[0].reason
    assert [entry.peer for entry in keys.entries] == [BORIS, CARLA]
    assert keys.to_bytes() == data
    assert keys.remove(BORIS).to_bytes() == data.replace(f"header\n{BORIS}\n".encode(), b"header\n")


def test_a_peer_can_be_removed_however_broken_its_line_is():
    keys = parse(f"{ANNA} expires=never\n{BORIS}\n{ANNA} # again\n")
    assert keys.remove(ANNA).to_bytes() == f"{BORIS}\n".encode()


def test_duplicates_are_reported_with_both_lines():
    keys = parse(f"{ANNA}\n\n{BORIS}\n{ANNA} expires=2020-01-01T00:00:00Z\n{PeerId.to_cid(BORIS)}\n")
    assert [(problem.line, problem.code) for problem in keys.problems] == [(4, "duplicate-peer"), (5, "duplicate-peer")]
    assert "line 1" in keys.problems[0].reason
    assert "line 3" in keys.problems[1].reason


def test_attributes_that_decide_nothing_may_be_odd():
    keys = parse(f"{ANNA} verified=yes group=X hmac_proof=12\n")
    assert [(problem.code, problem.fatal) for problem in keys.problems] == [("bad-value", False)] * 3
    assert keys.fatal_problems == ()
    assert keys.find(ANNA).verified is None


def test_comments_are_shown_without_what_could_harm_a_terminal():
    keys = parse(f"{ANNA} # a\x1b[2J\u202eb # c \n")
    assert keys.find(ANNA).comment == "a\ufffd[2J\ufffdb # c"
    assert keys.problems == ()


def test_lines_of_comment_may_hold_anything():
    data = b"# \xff\x00\x1b\n   #\n\t\n\n#" + b"x" * 10_000
    keys = parse(data)
    assert keys.problems == ()
    assert keys.to_bytes() == data


def test_a_file_that_is_too_large_is_not_read_and_not_edited():
    keys = parse(b"#" * (MAX_FILE + 1))
    assert keys.problems[0].code == "file-too-large"
    for edit in (keys.to_bytes, lambda: keys.add(ANNA), lambda: keys.remove(ANNA)):
        with pytest.raises(AuthorizedKeysError):
            edit()


def test_edits_that_cannot_be_made():
    keys = parse(FILE)
    for edit in (
        lambda: keys.add(ANNA),
        lambda: parse("").remove(ANNA),
        lambda: parse("").set_attribute(ANNA, "a", "b"),
        lambda: parse("").set_comment(ANNA, "b"),
    ):
        with pytest.raises(AuthorizedKeysError):
            edit()


@pytest.mark.parametrize(
    "comment",
    [
        "a\nb",
        "a\rb",
        "a\0b",
        "\x1b[31m",
        "\x7f",
        "\x9b",
        "a\u2028b",
        "\u202e",
        "\ufeffx",
        "\udcff",
        'a"b',
        "a`b",
        "a\\b",
        "x" * (MAX_COMMENT + 1),
    ],
)
def test_comments_that_are_refused(comment):
    with pytest.raises(AuthorizedKeysError):
        parse("").add(ANNA, comment)
    with pytest.raises(AuthorizedKeysError):
        parse(FILE).set_comment(ANNA, comment)


@pytest.mark.parametrize("comment", ["Anna's laptop", "  Küche #2 ", "😀", "x" * MAX_COMMENT, ""])
def test_comments_that_are_taken(comment):
    assert check_comment(comment) == comment.strip()
    assert parse(parse("").add(ANNA, comment).to_bytes()).find(ANNA).comment == comment.strip()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("", "x"),
        ("a b", "x"),
        ("a#", "x"),
        ("a=b", "x"),
        ("ä", "x"),
        ("a", "x y"),
        ("a", "x#y"),
        ("a", "x\ny"),
        ("a", "x\u00a0y"),
        ("a", 'x"'),
        ("a", "\x1b"),
        ("a", "\u202e"),
        ("expires", "tomorrow"),
        ("verified", "sha256:123"),
        ("verified", "sha256:0A1B2C3D"),
        ("group", ""),
        ("hmac_proof", "00"),
    ],
)
def test_attributes_that_are_refused(key, value):
    with pytest.raises(AuthorizedKeysError):
        parse(FILE).set_attribute(ANNA, key, value)
    with pytest.raises(AuthorizedKeysError):
        parse("").add(ANNA, "", {key: value})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:00:00Z", 0.0),
        ("1970-01-01t00:00:01z", 1.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("1969-12-31T23:59:59-00:00", -1.0),
        ("2026-12-24T18:00:00.5Z", 1798135200.5),
        ("2026-12-24T18:00:00.123456789Z", 1798135200.123456),
    ],
)
def test_times(text, seconds):
    assert parse_expires(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2026-12-24",
        "2026-12-24T18:00:00",
        "2026-12-24 18:00:00Z",
        "2026-12-24T18:00Z",
        "1798135200",
        "20261224T180000Z",
        "2026-13-01T00:00:00Z",
        "2026-12-24T24:00:00Z",
        "2026-12-24T23:59:60Z",
        "2026-12-24T18:00:00+1:00",
        "0000-01-01T00:00:00Z",
        "2026-12-24T18:00:00+25:00",
        "٢٠٢٦-12-24T18:00:00Z",
        "2026-W52-4T18:00:00Z",
    ],
)
def test_what_is_no_time(text):
    with pytest.raises(AuthorizedKeysError):
        parse_expires(text)


@given(st.integers(-62135596800, 253402300799))
def test_times_come_back(seconds):
    assert parse_expires(format_expires(seconds)) == seconds
    assert parse_expires(format_expires(seconds + 0.75)) == seconds


@pytest.mark.parametrize("when", [float("inf"), float("nan"), 1e30, -1e30])
def test_what_cannot_be_written_as_a_time(when):
    with pytest.raises(AuthorizedKeysError):
        format_expires(when)


peer_texts = st.sampled_from([str(ANNA), str(BORIS), CARLA.to_cid()])
words = st.one_of(peer_texts, st.sampled_from(["a=b", "expires=2030-01-01T00:00:00Z", "group=01234567", "#", "x", ""]))
spaces = st.sampled_from([" ", "  ", "\t", ""])
files = st.lists(st.lists(st.tuples(words, spaces).map("".join), max_size=5).map("".join), max_size=8).flatmap(
    lambda lines: st.sampled_from(["\n", "\r\n"]).map(lambda end: end.join(lines))
)


@given(files | st.binary(max_size=200))
def test_reading_loses_nothing(content):
    data = content.encode() if isinstance(content, str) else content
    assert AuthorizedKeys.parse(data).to_bytes() == data


@given(files, st.sampled_from([None, "00000000", "ffffffff"]))
def test_an_edit_changes_one_line_and_is_read_back(content, value):
    keys = parse(content)
    for entry in keys.entries:
        edited = keys.set_attribute(entry.peer, "group", value)
        assert edited == AuthorizedKeys.parse(edited.to_bytes())
        assert edited.find(entry.peer).attribute("group") == value
        others = [(key, val) for key, val in entry.attributes if key != "group"]
        assert [(key, val) for key, val in edited.find(entry.peer).attributes if key != "group"] == others
        assert edited.find(entry.peer).comment == entry.comment
        for number, (before, after) in enumerate(zip(keys.lines, edited.lines, strict=True), 1):
            assert before == after or number == entry.line
