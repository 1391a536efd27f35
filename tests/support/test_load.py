"""The load generator finds faults: a benchmark over a tunnel that loses bytes must fail, not be fast."""

import contextlib
import shutil
import socket
import threading

import pytest

from bench import load as bench_load
from bench.load import Load, LoadError

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")


@pytest.fixture(params=[pytest.param("C", marks=needs_compiler), "Python"])
def load(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(bench_load.shutil, "which", lambda _: None)
    made = Load()
    assert made.description.startswith(request.param)
    return made


@contextlib.contextmanager
def relay(target, alter):
    """A tunnel that hands each piece on its way to the server to `alter(piece, position)`."""

    def copy(source, sink, change):
        position = 0
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                sink.sendall(change(piece, position))
                position += len(piece)
            sink.shutdown(socket.SHUT_WR)

    def accept():
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", target))
                opened.extend([near, far])
                threading.Thread(target=copy, args=(near, far, alter), daemon=True).start()
                threading.Thread(target=copy, args=(far, near, lambda piece, _: piece), daemon=True).start()

    opened = []
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for each in [listener, *opened]:
            each.close()


def test_every_mode_works_on_a_clean_path(load):
    with load.server() as server, relay(server.port, lambda piece, _: piece) as port:
        for direction in ("up", "down"):
            moved = load.bulk(port, 5_000_000, streams=3, direction=direction)
            assert (moved.bytes, len(moved.each)) == (4_999_998, 3)
        assert load.echo(port, 50).count == 50
        assert load.connect(port, 10).failures == 0
        busy = load.busy(port, 5, seconds=0.2, size=4096)
        assert (busy.failures, busy.count) == (0, 5)
        assert busy.least > 0
        with load.hold(port, 20) as seconds:
            assert seconds > 0
        assert load.first(port, 5.0) > 0


def test_bytes_that_are_swapped_are_found(load):
    def swap(piece, position):
        return piece[::-1] if position > 1_000_000 else piece

    with load.server() as server, relay(server.port, swap) as port, pytest.raises(LoadError):
        load.bulk(port, 5_000_000)


def test_an_answer_with_another_byte_is_found(load):
    def alter(piece, position):
        return bytes(each ^ 1 for each in piece) if position >= 16 else piece

    with load.server() as server, relay(server.port, alter) as port:
        with pytest.raises(LoadError):
            load.echo(port, 10)
        assert load.busy(port, 2, seconds=0.1, size=64).failures == 2


def test_a_tunnel_that_leads_nowhere_is_found(load):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(LoadError):
        load.connect(port, 1)
    with pytest.raises(LoadError), load.hold(port, 2):
        pass
