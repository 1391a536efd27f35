"""The HTTP server under the control API and the metrics endpoint, over memory streams and real sockets."""

import json
import os
import socket
import stat

import pytest
import trio
import trio.testing

from actors.http import (
    HttpError,
    HttpLimits,
    HttpRequest,
    Response,
    Upgrade,
    Work,
    json_response,
    listen_unix,
    serve_connection,
    serve_http,
)


async def read_all(stream):
    received = b""
    while True:
        data = await stream.receive_some(65536)
        if not data:
            return received
        received += data


async def exchange(handler, *chunks, limits=None, half_close=True):
    """Send these bytes, and give back everything that the server says until it closes."""
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_connection(server, handler, limits=limits))
        for chunk in chunks:
            await client.send_all(chunk)
        if half_close:
            await client.send_eof()
        return await read_all(client)


def split(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:])
    return int(lines[0].split()[1]), headers, body


async def echo(request: HttpRequest):
    return json_response(
        {
            "method": request.method,
            "segments": request.segments,
            "query": dict(request.query),
            "body": request.body.decode(),
            "header": request.headers.get("x-test"),
        }
    )


async def test_a_request_reaches_the_handler_whole():
    answer = await exchange(
        echo,
        b"POST /v1/actors/proxy%2Fhome%2Fssh?limit=3&empty= HTTP/1.1\r\nHost: x\r\nX-Test: a\r\nX-Test: b\r\n",
        b"Content-Length: 5\r\n\r\nhe",
        b"llo",
    )
    status, headers, body = split(answer)
    assert status == 200
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {
        "method": "POST",
        "segments": ["v1", "actors", "proxy/home/ssh"],
        "query": {"limit": "3", "empty": ""},
        "body": "hello",
        "header": "a, b",
    }


async def test_keep_alive_serves_pipelined_requests_in_order():
    request = b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await exchange(echo, b"".join(request % number for number in range(20)))
    assert answer.count(b"HTTP/1.1 200 OK") == 20
    positions = [answer.index(b'"segments":["%d"]' % number) for number in range(20)]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET relative HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /%ff HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20000, 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
async def test_what_is_not_a_fair_request_is_refused_with_a_status(sent, status, autojump_clock):
    got, headers, body = split(await exchange(echo, sent, half_close=False))
    assert got == status
    assert headers["connection"] == "close"
    assert json.loads(body)["error"]["reason"]


async def test_a_chunked_body_over_the_limit_is_refused():
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    status, _, _ = split(await exchange(echo, head, *([chunk] * 5), limits=HttpLimits(body_bytes=4096)))
    assert status == 413


async def test_a_request_that_never_ends_is_refused(autojump_clock):
    answer = await exchange(echo, b"GET / HTTP/1.1\r\nHos", half_close=False, limits=HttpLimits(request_seconds=10))
    assert split(answer)[0] == 408
    assert trio.current_time() < 13


async def test_an_idle_connection_is_closed(autojump_clock):
    assert await exchange(echo, half_close=False, limits=HttpLimits(idle_seconds=60)) == b""


async def test_a_client_that_does_not_read_is_dropped(autojump_clock):
    async def endless(request):
        async def body():
            while True:
                yield b"x" * 1000

        return Response(body=body())

    # A stream pair whose sender waits until the other side reads.
    client, server = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_connection(server, endless, limits=HttpLimits(write_seconds=5)))
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert 5 <= trio.current_time() <= 11


async def test_a_handler_refuses_with_a_reason():
    async def refuse(request):
        raise HttpError(409, "already-exists", "it is there", "remove it first", headers=[("retry-after", "3")])

    status, headers, body = split(await exchange(refuse, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert (status, headers["retry-after"]) == (409, "3")
    assert json.loads(body) == {
        "error": {"code": "already-exists", "reason": "it is there", "action": "remove it first"}
    }


async def test_a_defect_answers_500_and_goes_up():
    async def broken(request):
        raise ZeroDivisionError

    client, server = trio.testing.memory_stream_pair()
    await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(ZeroDivisionError):
        await serve_connection(server, broken)
    assert split(await read_all(client))[0] == 500


async def test_chunks_are_sent_as_they_come():
    gate = trio.Event()

    async def slow(request):
        async def body():
            yield b"first\n"
            await gate.wait()
            yield b"second\n"

        return Response(body=body(), content_type="application/x-ndjson")

    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_connection(server, slow))
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        received = b""
        while b"first" not in received:
            received += await client.receive_some(65536)
        assert b"second" not in received
        gate.set()
        received += await read_all(client)
    assert b"transfer-encoding: chunked" in received.lower()
    assert received.endswith(b"7\r\nsecond\n\r\n0\r\n\r\n")


async def test_a_stream_ends_when_the_client_leaves():
    closed = trio.Event()

    async def endless(request):
        async def body():
            try:
                yield b"first\n"
                await trio.sleep_forever()
            finally:
                closed.set()

        return Response(body=body())

    client, server = trio.testing.memory_stream_pair()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: serve_connection(server, endless))
            await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await client.receive_some(65536)
            await client.aclose()
            await closed.wait()


async def test_head_has_no_body():
    answer = await exchange(echo, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
    status, headers, body = split(answer)
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0


async def test_expect_continue_is_answered_before_the_body():
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_connection(server, echo))
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert b"100" in await client.receive_some(1000)
        await client.send_all(b"ok")
        await client.send_eof()
        assert b'"body":"ok"' in await read_all(client)


async def upgrading(request):
    async def run(stream, left_over):
        data = left_over
        while data:
            await stream.send_all(data.upper())
            data = await stream.receive_some(1000)

    return Upgrade("peerup-tunnel", run)


async def test_an_upgrade_hands_over_the_stream_and_the_early_bytes():
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: serve_connection(server, upgrading))
        head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: peerup-tunnel\r\n\r\n"
        await client.send_all(head + b"early")
        received = b""
        while not received.endswith(b"EARLY"):
            received += await client.receive_some(1000)
        assert received.startswith(b"HTTP/1.1 101 ")
        await client.send_all(b"late")
        assert await client.receive_some(1000) == b"LATE"
        await client.send_eof()
        assert await read_all(client) == b""


async def test_an_upgrade_that_the_client_did_not_ask_for_is_refused():
    status, headers, _ = split(await exchange(upgrading, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert (status, headers["upgrade"]) == (426, "peerup-tunnel")


async def test_a_request_behind_one_that_is_not_upgraded_does_not_pass_for_its_wish():
    first = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    status, headers, _ = split(await exchange(upgrading, first + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
    assert (status, headers["upgrade"]) == (426, "peerup-tunnel")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"HEAD nowhere HTTP/1.1\r\nHost: x", 400),
        (b"HEAD /%ff HTTP/1.1\r\nHost: x", 400),
        (b"HEAD / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999", 413),
    ],
)
async def test_a_refused_head_is_answered_without_a_body(head, status):
    answer = await exchange(echo, head + b"\r\n\r\n")
    assert split(answer)[0] == status
    assert split(answer)[2] == b""


async def test_unix_socket_mode_and_credentials(tmp_path):
    seen = []

    async def remember(request):
        seen.append(request.credentials)
        return json_response(None)

    path = tmp_path / "control.sock"
    listener = listen_unix(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve_http(
                [listener], remember, allowed_uids=frozenset([os.getuid()]), task_status=task_status
            )
        )
        client = await trio.open_unix_socket(path)
        await client.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert split(await read_all(client))[0] == 200
        await client.aclose()
        nursery.cancel_scope.cancel()
    assert (seen[0].pid, seen[0].uid) == (os.getpid(), os.getuid())
    with pytest.raises(OSError, match="in use"):
        listen_unix(path)


async def test_another_user_is_refused_before_it_is_read(tmp_path):
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve_http(
                [listen_unix(tmp_path / "s")], echo, allowed_uids=frozenset([54321]), task_status=task_status
            )
        )
        client = await trio.open_unix_socket(tmp_path / "s")
        status, _, body = split(await read_all(client))
        assert (status, json.loads(body)["error"]["code"]) == (403, "wrong-user")
        await client.aclose()
        nursery.cancel_scope.cancel()


async def serve(nursery, path, handler, **options):
    await nursery.start(
        lambda task_status: serve_http([listen_unix(path)], handler, task_status=task_status, **options)
    )


GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"
CLOSE = b"GET /%s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def test_of_too_many_that_rest_the_one_that_rests_longest_is_closed(tmp_path):
    async with trio.open_nursery() as nursery:
        await serve(nursery, tmp_path / "s", echo, limits=HttpLimits(connections=2))
        silent, slow = [await trio.open_unix_socket(tmp_path / "s") for _ in range(2)]
        request = GET % b""
        await slow.send_all(request[:10])
        third = await trio.open_unix_socket(tmp_path / "s")
        await third.send_all(request)
        assert b" 200 " in await third.receive_some(1000)
        assert await read_all(silent) == b""
        await slow.send_all(request[10:])
        assert b" 200 " in await slow.receive_some(1000)
        for client in (silent, slow, third):
            await client.aclose()
        nursery.cancel_scope.cancel()


async def test_who_does_not_take_an_answer_rests(tmp_path):
    async def large(request):
        return Response(body=bytes(8_000_000))

    async with trio.open_nursery() as nursery:
        await serve(nursery, tmp_path / "s", large, limits=HttpLimits(connections=2))
        lazy = []
        for _ in range(5):
            lazy.append(await trio.open_unix_socket(tmp_path / "s"))
            await lazy[-1].send_all(GET % b"")
            await trio.testing.wait_all_tasks_blocked()
        brisk = await trio.open_unix_socket(tmp_path / "s")
        await brisk.send_all(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert len(await read_all(brisk)) > 8_000_000
        for client in (*lazy, brisk):
            await client.aclose()
        nursery.cancel_scope.cancel()


def kind(request):
    return Work(request.segments[0])


async def test_each_kind_of_work_has_places_of_its_own(tmp_path):
    free, begun = trio.Event(), []

    async def handler(request):
        begun.append(request.segments[0])
        if request.segments[1:] == ("stuck",):
            await free.wait()
        return json_response(None)

    limits = HttpLimits(connections=2, waiting=2, reserved=2)
    async with trio.open_nursery() as nursery:
        await serve(nursery, tmp_path / "s", handler, limits=limits, work_of=kind)

        async def ask(path):
            client = await trio.open_unix_socket(tmp_path / "s")
            await client.send_all(CLOSE % path)
            return client

        stuck = [await ask(path) for path in (b"waiting/stuck", b"brief/stuck") for _ in range(2)]
        while len(begun) < 4:
            await trio.testing.wait_all_tasks_blocked()
        queued = await ask(b"brief/")
        for path in (b"reserved/", b"at-once/"):
            client = await ask(path)
            assert b" 200 " in await client.receive_some(1000)
            await client.aclose()
        refused = await ask(b"waiting/")
        status, _, body = split(await read_all(refused))
        assert (status, json.loads(body)["error"]["code"]) == (503, "too-many-waiting")
        await stuck[0].aclose()  # whoever leaves makes room, without waiting for the end
        await trio.testing.wait_all_tasks_blocked()
        late = await ask(b"waiting/")
        assert b" 200 " in await late.receive_some(1000)
        free.set()
        assert b" 200 " in await queued.receive_some(1000)
        for client in (*stuck[1:], queued, refused, late):
            await client.aclose()
        nursery.cancel_scope.cancel()


async def test_a_request_that_gets_no_place_in_time_is_told_so(tmp_path):
    async def stuck(request):
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        limits = HttpLimits(connections=1, waiting=1, request_seconds=1.0)
        await serve(nursery, tmp_path / "s", stuck, limits=limits)
        clients = []
        for _ in range(2):  # one after the other: a connection that rests may be ended for a newcomer
            client = await trio.open_unix_socket(tmp_path / "s")
            clients.append(client)
            await client.send_all(CLOSE % b"")
            await trio.testing.wait_all_tasks_blocked(0.05)
        status, _, body = split(await read_all(clients[1]))
        assert (status, json.loads(body)["error"]["code"]) == (503, "too-many-requests")
        for client in clients:
            await client.aclose()
        nursery.cancel_scope.cancel()


async def test_a_refusal_over_tcp_is_read_even_though_the_body_was_not():
    sock = trio.socket.socket(socket.AF_INET)
    await sock.bind(("127.0.0.1", 0))
    sock.listen()
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: serve_http([trio.SocketListener(sock)], echo, task_status=task_status))
        client = await trio.open_tcp_stream(*sock.getsockname())
        await client.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 200_000)
        assert split(await read_all(client))[0] == 413
        await client.aclose()
        nursery.cancel_scope.cancel()
