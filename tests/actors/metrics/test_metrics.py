"""The metrics endpoint: what a scrape gathers, that nobody can spoil it, and that its port survives a kill."""

import os
import socket

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from actors.metrics.actor import COLLECT_SECONDS, Metrics, names_this_machine
from actors.metrics.exposition import Exposition
from actors.metrics.processes import process_samples
from protocol.messages.system import ChildStatus, CollectMetrics, ReadTree, Sample, Tree
from supervisor.actor import Actor
from tests.support.stage import Stage, StartFailedError


class Worker(Actor):
    async def start(self, checkpoint):
        self.context.metrics.counter("peerup_work_total", kind="a").inc(3)
        self.context.metrics.gauge("peerup_level").set(-1.5)
        histogram = self.context.metrics.histogram("peerup_wait_seconds", (0.1, 1.0))
        for value in (0.05, 0.5, 0.5, 5):
            histogram.observe(value)
        return {}


def child(name, *, pid=None, state="running", restarts=0):
    return ChildStatus(name, "m:C", "root", pid, state, 12.5, 1, restarts, 2, 40, "")


class FakeRoot:
    """Answers for the supervisor on top, with this tree."""

    def __init__(self, stage, *children):
        self.children = children
        exchange = stage.visitor("root").exchange
        exchange.on(ReadTree, lambda _, envelope: exchange.answer(envelope, Tree(tuple(self.children))))


async def fetch(listen, request=b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
    host, port = listen.rsplit(":", 1)
    async with await trio.open_tcp_stream(host.strip("[]"), int(port)) as stream:
        await stream.send_all(request)
        answer = b""
        async for chunk in stream:
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), body.decode()


def series(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_scrape_gathers_every_actors_series():
    async with Stage() as stage:
        await stage.start("worker", Worker())
        await stage.start("proxy/home/ssh", Worker())
        ready = await stage.start("metrics", Metrics("127.0.0.1:0"))
        FakeRoot(stage, child("worker", pid=os.getpid(), restarts=7), child("proxy/home/ssh"))
        status, head, text = await fetch(ready["listen"])
        assert status == 200
        assert "content-type: text/plain; version=0.0.4" in head
        found = series(text)
        for actor in ("worker", "proxy/home/ssh"):
            label = ("actor", actor)
            assert found["peerup_work_total", label, ("kind", "a")] == 3
            assert found["peerup_level", label] == -1.5
            assert found["peerup_wait_seconds_bucket", label, ("le", "0.1")] == 1
            assert found["peerup_wait_seconds_bucket", label, ("le", "1")] == 3
            assert found["peerup_wait_seconds_bucket", label, ("le", "+Inf")] == 4
            assert found["peerup_wait_seconds_count", label] == 4
            assert found["peerup_wait_seconds_sum", label] == pytest.approx(6.05)
            assert found["peerup_actor_up", label] == 1
            assert found["peerup_actor_scraped", label] == 1
        worker = ("actor", "worker")
        assert found["peerup_actor_restarts_total", worker] == 7
        assert found["peerup_actor_mailbox", worker] == 2
        assert found["peerup_process_open_fds", worker] >= 3
        assert found["peerup_process_resident_memory_bytes", worker] > 1_000_000
        assert ("peerup_process_open_fds", ("actor", "proxy/home/ssh")) not in found
        assert found[("peerup_actors",)] == 2
        assert text.count("# TYPE peerup_work_total counter") == 1


async def test_a_silent_a_dead_and_a_missing_actor_do_not_spoil_a_scrape(autojump_clock):
    # The answers are asked for directly: sockets and a clock that jumps do not go together.
    async with Stage() as stage:
        exporter = Metrics("127.0.0.1:0")
        await stage.start("worker", Worker())
        await stage.start("metrics", exporter)
        stage.visitor("hung").exchange.on(CollectMetrics, lambda *_: None)
        FakeRoot(
            stage, child("worker"), child("hung"), child("gone", state="backing-off"), child("pidless", pid=2**22 + 1)
        )
        began = trio.current_time()
        found = series((await exporter.scrape()).decode())
        assert trio.current_time() - began <= COLLECT_SECONDS + 0.1
        assert found["peerup_work_total", ("actor", "worker"), ("kind", "a")] == 3
        scraped = {name: found["peerup_actor_scraped", ("actor", name)] for name in ("worker", "hung", "gone")}
        assert scraped == {"worker": 1, "hung": 0, "gone": 0}
        assert found["peerup_actor_up", ("actor", "gone")] == 0
        assert stage.describe("metrics")["silent_actors"] == ["gone", "hung", "pidless"]


async def test_without_a_tree_it_says_so(autojump_clock):
    async with Stage() as stage:
        exporter = Metrics("127.0.0.1:0")
        await stage.start("metrics", exporter)
        found = series((await exporter.scrape()).decode())
        assert found[("peerup_tree_readable",)] == 0
        assert found[("peerup_actors",)] == 0


async def test_only_metrics_are_served():
    async with Stage() as stage:
        listen = (await stage.start("metrics", Metrics("127.0.0.1:0")))["listen"]
        FakeRoot(stage)
        for request, status in [
            (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
            (b"GET /metrics HTTP/1.1\r\nHost: evil.example:1\r\nConnection: close\r\n\r\n", 421),
            (b"POST /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", 405),
            (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n", 413),
            (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        ]:
            assert (await fetch(listen, request))[0] == status
        assert (await fetch(listen))[0] == 200


async def test_the_port_outlives_a_kill_and_waiting_clients_are_served_by_the_successor():
    async with Stage() as stage:
        listen = (await stage.start("metrics", Metrics("127.0.0.1:0")))["listen"]
        FakeRoot(stage)
        await stage.kill("metrics")
        host, port = listen.rsplit(":", 1)
        async with await trio.open_tcp_stream(host, int(port)) as waiting:
            await waiting.send_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert (await stage.start("metrics", Metrics("127.0.0.1:0")))["listen"] == listen
            with trio.fail_after(5):
                assert b"200 OK" in await waiting.receive_some(1000)


async def test_another_address_is_not_inherited():
    async with Stage() as stage:
        first = (await stage.start("metrics", Metrics("127.0.0.1:0")))["listen"]
        await stage.kill("metrics")
        second = (await stage.start("metrics", Metrics("[::1]:0")))["listen"]
        assert second.startswith("[::1]:")
        with pytest.raises(OSError, match="all attempts to connect"):
            await fetch(first)


async def test_a_port_in_use_ends_the_actor_with_the_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        async with Stage() as stage:
            with pytest.raises(StartFailedError, match=r"telemetry\.metrics\.listen_address") as failure:
                await stage.start("metrics", Metrics(f"127.0.0.1:{taken.getsockname()[1]}"))
            assert failure.value.code == "port-in-use"


def test_what_the_format_forbids_is_left_out_and_the_rest_shown():
    exposition = Exposition()
    exposition.add(
        "a",
        [
            Sample("peerup_good_total", "counter", {"path": 'quo"te\\ and\nline'}, 1),
            Sample("bad name", "gauge", {}, 1),
            Sample("peerup_x", "gauge", {"bad-label": "1"}, 1),
            Sample("peerup_x", "gauge", {"__reserved": "1"}, 1),
            Sample("peerup_x", "summary", {}, 1),
            Sample("peerup_level", "gauge", {"actor": "other"}, float("inf")),
        ],
    )
    exposition.add("b", [Sample("peerup_level", "counter", {}, 1), Sample("peerup_good_total", "counter", {}, 2)])
    found = series(exposition.render().decode())
    assert found == {
        ("peerup_good_total", ("actor", "a"), ("path", 'quo"te\\ and\nline')): 1,
        ("peerup_good_total", ("actor", "b")): 2,
        ("peerup_level", ("actor", "a"), ("exported_actor", "other")): float("inf"),
    }
    assert len(exposition.left_out) == 5


def test_a_process_with_an_odd_name_and_one_that_is_gone(tmp_path):
    directory = tmp_path / "7"
    (directory / "fd").mkdir(parents=True)
    ticks = os.sysconf("SC_CLK_TCK")
    (directory / "stat").write_text(f"7 (odd) name (x)) S {' '.join(['0'] * 10)} {3 * ticks} {ticks} 0 0\n")
    (directory / "statm").write_text("100 50 1 1 1 1 1\n")
    found = {sample.name: sample.value for sample in process_samples(7, tmp_path)}
    assert found["peerup_process_cpu_seconds_total"] == 4
    assert found["peerup_process_resident_memory_bytes"] == 50 * os.sysconf("SC_PAGE_SIZE")
    assert process_samples(8, tmp_path) == ()


def test_a_process_whose_descriptors_are_hidden_is_told_of_all_the_same(tmp_path):
    directory = tmp_path / "7"
    directory.mkdir()
    (directory / "stat").write_text("7 (gate) S " + " ".join(["0"] * 10) + " 100 50 0 0 0")
    (directory / "statm").write_text("100 10 5 1 0 4 0")
    names = [sample.name for sample in process_samples(7, tmp_path)]
    assert names == ["peerup_process_cpu_seconds_total", "peerup_process_resident_memory_bytes"]


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1:9091", True),
        ("[::1]:9091", True),
        ("localhost:9091", True),
        ("LOCALHOST", True),
        ("home", True),
        (socket.gethostname(), True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:9091", False),
        ("localhost.evil.example", False),
        ("evil.example.", False),
    ],
)
def test_a_web_page_whose_name_was_pointed_here_gets_nothing(host, served):
    assert names_this_machine(host) is served
