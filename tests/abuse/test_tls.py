"""What TLS must refuse, whoever asks for it: old versions, weak ciphers, renegotiation, others' certificates."""

from __future__ import annotations

import contextlib
import ssl
import time
from pathlib import Path

import pytest

from actors.switchboard.tls import ClientTrust, ServerCertificate
from tests.support.certificates import Authority

OLD = (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1)
pytestmark = [
    # To ask for them is what these tests are for.
    pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1:DeprecationWarning"),
]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server(authority: Authority) -> ssl.SSLContext:
    certificate, key = authority.issue("home.example")
    return ServerCertificate(certificate, key, warn=lambda _: None, wall=time.time).context()


@pytest.fixture
async def client(authority: Authority) -> ssl.SSLContext:
    return await ClientTrust(authority.file).context()


def careless(side: int) -> ssl.SSLContext:
    """One that agrees to anything."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    return context


def shake(client: ssl.SSLContext, server: ssl.SSLContext, name: str | None = "home.example") -> ssl.SSLObject:
    """A handshake in memory. The client's side of it."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(down, up, server_hostname=name)
    far = server.wrap_bio(up, down, server_side=True)
    for _ in range(10):
        done = 0
        for side in (near, far):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
                done += 1
        if done == 2:
            return near
    raise AssertionError("no end")


async def test_honest_sides_agree_on_the_newest(client: ssl.SSLContext, server: ssl.SSLContext) -> None:
    agreed = shake(client, server)
    assert agreed.version() == "TLSv1.3"
    assert agreed.selected_alpn_protocol() == "http/1.1"
    assert agreed.compression() is None


@pytest.mark.parametrize("version", OLD)
def test_a_server_refuses_old_versions(server: ssl.SSLContext, version: ssl.TLSVersion) -> None:
    old = careless(ssl.PROTOCOL_TLS_CLIENT)
    old.minimum_version = old.maximum_version = version
    with pytest.raises(ssl.SSLError):
        shake(old, server)


@pytest.mark.parametrize("version", OLD)
async def test_a_client_refuses_old_versions(
    client: ssl.SSLContext, authority: Authority, version: ssl.TLSVersion
) -> None:
    old = careless(ssl.PROTOCOL_TLS_SERVER)
    old.load_cert_chain(*authority.issue("home.example"))
    old.minimum_version = old.maximum_version = version
    with pytest.raises(ssl.SSLError):
        shake(client, old)


@pytest.mark.parametrize("ciphers", ["NULL", "aNULL", "3DES:RC4:DES:EXPORT:LOW", "CAMELLIA:SEED:IDEA"])
def test_a_server_refuses_weak_ciphers(server: ssl.SSLContext, ciphers: str) -> None:
    weak = careless(ssl.PROTOCOL_TLS_CLIENT)
    weak.maximum_version = ssl.TLSVersion.TLSv1_2
    try:
        weak.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    except ssl.SSLError:
        pytest.skip("not even this machine's library has them")
    with pytest.raises(ssl.SSLError):
        shake(weak, server)


def test_nobody_may_renegotiate_or_compress(server: ssl.SSLContext) -> None:
    assert server.options & ssl.OP_NO_RENEGOTIATION
    assert server.options & ssl.OP_NO_COMPRESSION
    assert not any(cipher["auth"] == "auth-null" for cipher in server.get_ciphers())


@pytest.mark.parametrize("name", ["other.example", "192.0.2.1", "xhome.example", "a.home.example", "example"])
async def test_a_client_believes_no_other_name(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(client, server, name)


async def test_a_client_believes_no_other_authority(
    client: ssl.SSLContext, tmp_path: Path, authority: Authority
) -> None:
    (tmp_path / "other").mkdir()
    other = Authority(tmp_path / "other")  # of the same name
    impostor = careless(ssl.PROTOCOL_TLS_SERVER)
    impostor.load_cert_chain(*other.issue("home.example"))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake(client, impostor)


async def test_a_client_demands_a_certificate_and_a_name(client: ssl.SSLContext) -> None:
    assert client.verify_mode == ssl.CERT_REQUIRED
    assert client.check_hostname
    anonymous = careless(ssl.PROTOCOL_TLS_SERVER)
    anonymous.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake(client, anonymous)
