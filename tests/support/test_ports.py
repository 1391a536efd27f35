import socket
import subprocess
import sys
from pathlib import Path

from tests.support.ports import BLOCK, LOWEST, own_port


def test_a_port_can_be_listened_on_and_is_given_once() -> None:
    ports = [own_port() for _ in range(120)]
    assert len(set(ports)) == len(ports)
    assert max(ports) < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    with socket.create_server(("127.0.0.1", ports[-1])):
        pass


def test_another_process_is_given_others() -> None:
    mine = {own_port() for _ in range(120)}
    script = "from tests.support.ports import own_port; print(*(own_port() for _ in range(120)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    theirs = {int(word) for word in done.stdout.split()}
    assert len(theirs) == 120
    assert not theirs & mine


def test_one_that_is_taken_is_left_out() -> None:
    while (following := own_port() + 1) % BLOCK == LOWEST % BLOCK:  # the next would be in another block
        pass
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", following))
        squatter.listen()
        assert own_port() != following
