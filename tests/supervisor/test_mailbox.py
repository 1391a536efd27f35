"""The bounded mailbox and its three policies."""

from __future__ import annotations

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.messages.system import Overflow
from supervisor.mailbox import Mailbox


def full(overflow):
    mailbox = Mailbox(2, overflow)
    assert mailbox.put("a") is None
    assert mailbox.put("b") is None
    return mailbox


@pytest.mark.parametrize(
    ("overflow", "displaced", "left"),
    [
        (Overflow.REFUSE, "c", ["a", "b"]),
        (Overflow.DROP_NEWEST, "c", ["a", "b"]),
        (Overflow.DROP_OLDEST, "a", ["b", "c"]),
    ],
)
def test_one_more_than_fits(overflow, displaced, left):
    mailbox = full(overflow)
    assert mailbox.put("c") == displaced
    assert mailbox.dropped == 1
    assert [mailbox.take(), mailbox.take(), mailbox.take()] == [*left, None]


def test_forced_notices_always_fit():
    mailbox = full(Overflow.REFUSE)
    mailbox.force("notice")
    assert len(mailbox) == 3
    assert mailbox.dropped == 0
    assert mailbox.clear() == ["a", "b", "notice"]
    assert len(mailbox) == 0


def test_a_mailbox_holds_at_least_one():
    with pytest.raises(ValueError, match="at least one"):
        Mailbox(0, Overflow.REFUSE)


@given(st.sampled_from(Overflow), st.integers(1, 5), st.lists(st.booleans(), max_size=40))
def test_it_behaves_like_a_bounded_list(overflow, limit, puts):
    mailbox = Mailbox(limit, overflow)
    model = collections.deque()
    lost = 0
    for number, put in enumerate(puts):
        if not put:
            assert mailbox.take() == (model.popleft() if model else None)
            continue
        displaced = mailbox.put(number)
        if len(model) < limit:
            assert displaced is None
            model.append(number)
        elif overflow is Overflow.DROP_OLDEST:
            assert displaced == model.popleft()
            model.append(number)
            lost += 1
        else:
            assert displaced == number
            lost += 1
        assert len(mailbox) == len(model) <= limit
    assert mailbox.dropped == lost
