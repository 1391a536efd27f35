"""A supervisor opens files on behalf of a child: those that it lends, wherever their names lead at that moment."""

from __future__ import annotations

import os
import threading

import pytest

from supervisor.lending import Borrower, Lender, borrow_from, open_for_reading


@pytest.fixture
def lend():
    """`lend(paths)` makes a lender with a thread as its supervisor, and the child's side."""
    made = []

    def make(*paths: str, serve: bool = True) -> Borrower:
        lender = Lender(paths)
        borrower = Borrower(lender.other, [*paths, "/not/lent"])
        gone = threading.Event()

        def run() -> None:
            lender.socket.setblocking(True)
            while not gone.is_set():
                lender.serve(gone.set)

        thread = threading.Thread(target=run, daemon=True)
        if serve:
            thread.start()
        made.append((lender, thread))
        return borrower

    yield make
    borrow_from(None)
    for lender, thread in made:
        lender.other.close()
        if thread.ident is not None:
            thread.join(5)
            assert not thread.is_alive()
        lender.close()


def content(descriptor: int) -> bytes:
    with open(descriptor, "rb") as file:
        return file.read()


def test_the_file_is_what_its_name_means_at_that_moment(tmp_path, lend):
    link, first, second = tmp_path / "link", tmp_path / "first", tmp_path / "second"
    first.write_text("first")
    second.write_text("second")
    link.symlink_to(first)
    borrower = lend(str(link))
    assert content(borrower.open(str(link))) == b"first"
    link.unlink()
    with pytest.raises(FileNotFoundError):
        borrower.open(str(link))
    link.symlink_to(second)
    assert content(borrower.open(str(link))) == b"second"


def test_nothing_else_is_lent(tmp_path, lend):
    (tmp_path / "secret").write_text("x")
    borrower = lend(str(tmp_path / "plain"))
    with pytest.raises(PermissionError):
        borrower.open(str(tmp_path / "secret"))


def test_a_supervisor_that_does_not_answer_says_nothing_about_the_file(tmp_path, lend):
    """A file that seems to be gone would cut every peer off; nothing may be concluded from silence."""
    file = tmp_path / "file"
    file.write_text("x")
    lender = Lender([str(file)])
    borrower = Borrower(lender.other, [str(file)])
    lender.socket.close()
    with pytest.raises(BlockingIOError):  # EAGAIN
        borrower.open(str(file))
    lender.close()


def test_what_is_not_lent_is_opened_here(tmp_path, lend):
    lent, own = tmp_path / "lent", tmp_path / "own"
    lent.write_text("lent")
    own.write_text("own")
    borrow_from(lend(str(lent)))
    assert content(open_for_reading(own)) == b"own"
    assert content(open_for_reading(lent)) == b"lent"
    lent.unlink()
    os.mkfifo(lent)
    os.close(open_for_reading(lent))  # and does not wait for somebody to write
