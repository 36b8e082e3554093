"""Who gets in: certificates of every wrong kind, sites that nobody expects, peers that never finish."""

from __future__ import annotations

import datetime
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
import xxhash
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from prfaas_sglang.core.framing import FrameType, Header, encode_header
from prfaas_sglang.core.layout import Hello, encode_hello, to_json
from prfaas_sglang.transfer import channel, listener, telemetry, tls
from prfaas_sglang.transfer.tls import Tls, TlsFiles, shake
from prfaas_sglang.transfer.wire import Wire
from tests.integration.authority import Authority
from tests.integration.transfer_support import LAYOUT, NO_ROOM, WAIT_S, Pair, assert_moved

DAY = datetime.timedelta(days=1)
PEM = serialization.Encoding.PEM


class Signer:
    """Signs whatever a test asks for, however wrong."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.chain: list[x509.Certificate] = []
        self.cert = self.sign(self.key.public_key(), name, ca=True)
        self.ca = folder / f"{name}.ca.pem"
        self.ca.write_bytes(self.cert.public_bytes(PEM))

    def sign(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common: str,
        *,
        names: tuple[str, ...] = (),
        ca: bool = False,
        begins: datetime.timedelta = -DAY,
        ends: datetime.timedelta = DAY,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begins)
            .not_valid_after(now + ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            entries = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
            builder = builder.add_extension(entries, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def issue(self, site: str, trusts: Path | None = None, **how: object) -> Tls:
        """Return contexts with a certificate for a site, who trust our authority (or another)."""
        key = ec.generate_private_key(ec.SECP256R1())
        cert = self.sign(key.public_key(), site, **{"names": (site,), **how})  # type: ignore[arg-type]
        return self.contexts(site, key, [cert, *self.chain], trusts or self.ca)

    def contexts(
        self, site: str, key: ec.EllipticCurvePrivateKey, chain: list[x509.Certificate], ca: Path
    ) -> Tls:
        stem = self.folder / f"{self.name}-{site}"
        stem.with_suffix(".pem").write_bytes(b"".join(cert.public_bytes(PEM) for cert in chain))
        pem = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        stem.with_suffix(".key").write_bytes(pem)
        return Tls(TlsFiles(str(ca), str(stem.with_suffix(".pem")), str(stem.with_suffix(".key"))))


@pytest.fixture
def ours(tmp_path: Path) -> Signer:
    return Signer(tmp_path, "ours")


def expired(ours: Signer, site: str) -> Tls:
    return ours.issue(site, begins=-2 * DAY, ends=-DAY)


def not_yet_valid(ours: Signer, site: str) -> Tls:
    return ours.issue(site, begins=DAY, ends=2 * DAY)


def self_signed(ours: Signer, site: str) -> Tls:
    own = Signer(ours.folder, site)
    own.cert = own.sign(own.key.public_key(), site, names=(site,))
    return own.contexts(site, own.key, [own.cert], ours.ca)


def unknown_authority(ours: Signer, site: str) -> Tls:
    return Signer(ours.folder, "theirs").issue(site, trusts=ours.ca)


def same_name_authority(ours: Signer, site: str) -> Tls:
    folder = ours.folder / "other"
    folder.mkdir()
    return Signer(folder, "ours").issue(site, trusts=ours.ca)


def signed_by_another_site(ours: Signer, site: str) -> Tls:
    """The key of site C signs a certificate for this one, and shows C's own as its authority."""
    other = Signer(ours.folder, "C")
    other.chain = [ours.sign(other.key.public_key(), "C", names=("C",))]
    return other.issue(site, trusts=ours.ca)


def another_site(ours: Signer, site: str) -> Tls:
    return ours.issue("C")


def only_a_common_name(ours: Signer, site: str) -> Tls:
    return ours.issue(site, names=())


def a_wildcard(ours: Signer, site: str) -> Tls:
    return ours.issue(site, names=("*",))


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize(
    "wrong",
    [
        expired,
        not_yet_valid,
        self_signed,
        unknown_authority,
        same_name_authority,
        signed_by_another_site,
        another_site,
        only_a_common_name,
        a_wildcard,
    ],
)
def test_a_wrong_certificate_is_refused(ours: Signer, wrong: Callable[[Signer, str], Tls], side: str) -> None:
    """Whichever side shows it, the request fails and nothing is granted."""
    good = {"prefill": ours.issue("A"), "decode": ours.issue("B")}
    good[side] = wrong(ours, "A" if side == "prefill" else "B")
    with closing(Pair(prefill_tls=good["prefill"], decode_tls=good["decode"])) as pair:
        pair.begin(1, [1], state=0, aux=0)
        assert pair.decode.wait(1, "failed")
        assert pair.exporter.grant(1) is None


def test_only_expected_sites_get_in(ours: Signer) -> None:
    """A good certificate of a site that is not in peer_sites: refused by name, on either side."""
    contexts = {"prefill_tls": ours.issue("A"), "decode_tls": ours.issue("C")}
    for peers, message in (
        ({"prefill_peers": ("B",)}, "hello.site: C is not in peer_sites of a-0"),
        ({"decode_peers": ("X", "Y")}, "hello.site: A is not in peer_sites of b-0"),
    ):
        with closing(Pair(decode_site="C", **contexts, **peers)) as pair:  # type: ignore[arg-type]
            pair.begin(1, [1], state=0, aux=0)
            assert message in pair.decode.wait(1, "failed")
            assert pair.exporter.grant(1) is None
    with closing(Pair(decode_site="C", **contexts, prefill_peers=("B", "C"), decode_peers=("A",))) as pair:
        serve_one(pair, 1)


def test_without_tls_peer_sites_still_finds_mistakes() -> None:
    """The peer's word is all there is, and a worker that says the wrong site is refused."""
    with closing(Pair(decode_site="C", prefill_peers=("B",))) as pair:
        pair.begin(1, [1], state=0, aux=0)
        assert "hello.site: C" in pair.decode.wait(1, "failed")


def serve_one(pair: Pair, room: int) -> None:
    """A well-behaved request from begin to end."""
    pair.begin(room, [room], state=1, aux=1)
    pair.prefill.wait(room, "grant")
    pair.exporter.send(room, [4], states=[[2]], aux_row=2, last=True)
    pair.decode.wait(room, "done")
    assert_moved(pair, [[4], [2], [2]], [[room], [1], [1]])


def closed_within(sock: socket.socket, seconds: float) -> bool:
    """True when the peer closes the connection in time; what it says before is thrown away."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([sock], [], [], left)[0]:
            continue
        try:
            if not sock.recv(65536):
                return True
        except OSError:
            return True
    return False


def hello_frame(worker: str = "b-9", index: int = 0) -> bytes:
    payload = encode_hello(Hello("decode", "B", worker, 0, to_json(LAYOUT), f"bundle-of-{worker}", index))
    return (
        encode_header(Header(FrameType.HELLO, len(payload), 0, xxhash.xxh3_64_intdigest(payload))) + payload
    )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "fleet")


@pytest.fixture
def secured(authority: Authority) -> Iterator[Pair]:
    with closing(Pair(prefill_tls=authority.issue("A"), decode_tls=authority.issue("B"))) as pair:
        yield pair


def client(authority: Authority, *, certificate: bool = True) -> ssl.SSLContext:
    """A peer's context, of any version."""
    files = authority.files("B")
    context = ssl.create_default_context(cafile=files.ca)
    context.check_hostname = False
    if certificate:
        context.load_cert_chain(files.cert, files.key)
    return context


def test_older_tls_is_refused(secured: Pair, authority: Authority) -> None:
    """A client that speaks TLS 1.2 at most, with the right certificate."""
    context = client(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(secured.address, timeout=WAIT_S) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain)
    serve_one(secured, 1)


def test_a_client_without_a_certificate_is_refused(secured: Pair, authority: Authority) -> None:
    """It gets no hello."""
    context = client(authority, certificate=False)
    with (
        socket.create_connection(secured.address, timeout=WAIT_S) as plain,
        suppress(ssl.SSLError, ConnectionError),  # or it is closed without an alert
        context.wrap_socket(plain) as sock,
    ):
        sock.sendall(hello_frame())
        assert not sock.recv(1)
    serve_one(secured, 1)


def test_a_plain_peer_of_a_tls_port_hears_nothing(secured: Pair) -> None:
    """It gets a TLS alert at most, never a frame."""
    with socket.create_connection(secured.address, timeout=WAIT_S) as sock:
        sock.sendall(hello_frame())
        answer = b""
        with suppress(ConnectionError):
            while data := sock.recv(65536):
                answer += data
    assert b"PK" not in answer
    assert len(answer) < 64
    serve_one(secured, 1)


def test_a_tls_peer_of_a_plain_port_is_refused(authority: Authority) -> None:
    """Its handshake fails, and others are served."""
    with closing(Pair()) as pair:
        with (
            socket.create_connection(pair.address, timeout=WAIT_S) as plain,
            pytest.raises((ssl.SSLError, ConnectionError)),
        ):
            client(authority).wrap_socket(plain)
        serve_one(pair, 1)


def test_early_garbage_inside_tls_is_refused(secured: Pair, authority: Authority) -> None:
    """After a good handshake, bytes that are no frame close the connection."""
    with (
        socket.create_connection(secured.address, timeout=WAIT_S) as plain,
        client(authority).wrap_socket(plain) as sock,
    ):
        sock.sendall(b"\x16\x03\x01" * 100)
        assert closed_within(sock, WAIT_S)
    serve_one(secured, 1)


def test_no_session_can_be_resumed(secured: Pair, authority: Authority) -> None:
    """The listener hands out no tickets, so every connection shows its certificate."""
    with (
        socket.create_connection(secured.address, timeout=WAIT_S) as plain,
        client(authority).wrap_socket(plain) as sock,
    ):
        sock.sendall(hello_frame())
        assert sock.recv(28)[:2] == b"PK"
        assert sock.session is None or not sock.session.has_ticket


def test_closing_never_falls_back_to_plain_text(authority: Authority) -> None:
    """A connection that is closed under its writer is still encrypted for whoever sends next."""
    near, far = socket.socketpair()
    server = authority.issue("A").wrap(near)
    with ThreadPoolExecutor(1) as pool, server:
        dialing = pool.submit(authority.issue("B").connect, far)
        shake(server)
        with dialing.result(WAIT_S):
            wire = Wire(server)
            wire.close()
            assert server.version() == "TLSv1.3"  # None for a socket that would send in the clear
            with pytest.raises(channel.ConnectionLost):
                wire.send(FrameType.PING, 0)


@pytest.mark.parametrize("encrypted", [False, True])
def test_silent_connections_do_not_keep_a_good_peer_out(
    authority: Authority, encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many connections that never say hello: a few are kept, the newest; a good peer is served at once."""
    monkeypatch.setattr(listener, "MAX_WAITING", 8)
    contexts = {"prefill_tls": authority.issue("A"), "decode_tls": authority.issue("B")} if encrypted else {}
    with ExitStack() as stack:
        pair = stack.enter_context(closing(Pair(**contexts)))
        silent = [
            stack.enter_context(socket.create_connection(pair.address, timeout=WAIT_S)) for _ in range(60)
        ]
        for sock in silent[:40]:
            assert closed_within(sock, WAIT_S)
        started = time.monotonic()
        serve_one(pair, 1)
        assert time.monotonic() - started < tls.HANDSHAKE_S / 2
        assert any(not closed_within(sock, 0.01) for sock in silent[-4:])


def test_one_address_cannot_take_the_places_of_another() -> None:
    """In a full lobby the oldest of the largest crowd goes, not the oldest of all."""
    with ExitStack() as stack:
        lobby = listener._Lobby(4)
        ends = [[stack.enter_context(s) for s in socket.socketpair()] for _ in range(6)]
        guests = [listener._Guest(ends[0][0], "good")]
        guests += [listener._Guest(near, "bad") for near, _ in ends[1:]]
        for guest in guests:
            lobby.enter(guest)
        gone = [closed_within(far, 0.01) for _, far in ends]
        assert gone == [False, True, True, False, False, False]
        lobby.leave(guests[1])
        lobby.leave(guests[0])
        lobby.enter(guests[0])
        assert not closed_within(ends[3][1], 0.01)


def trickle(sock: socket.socket, data: bytes, every_s: float, seconds: float) -> bool:
    """Send a byte now and then; True when the peer ends that in time."""
    deadline = time.monotonic() + seconds
    for byte in data * 1000:
        if closed_within(sock, every_s):
            return True
        if time.monotonic() > deadline:
            return False
        with suppress(OSError):
            sock.send(bytes([byte]))
    return False


def client_hello(authority: Authority) -> bytes:
    """The first flight of a TLS client."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        client(authority).wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("stage", ["silent", "half-tls", "tls-then-silent", "slow-hello"])
def test_a_handshake_is_bounded_in_time(
    authority: Authority, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither silence nor a byte now and then keeps a connection open; a good peer is served meanwhile."""
    monkeypatch.setattr(tls, "HANDSHAKE_S", 0.4)
    monkeypatch.setattr(channel, "HANDSHAKE_S", 0.4)
    contexts = {"prefill_tls": authority.issue("A"), "decode_tls": authority.issue("B")}
    with ExitStack() as stack:
        pair = stack.enter_context(closing(Pair(**contexts)))
        sock = stack.enter_context(socket.create_connection(pair.address, timeout=WAIT_S))
        if stage == "half-tls":
            assert trickle(sock, client_hello(authority), 0.02, 4)
        elif stage == "silent":
            assert closed_within(sock, 4)
        else:
            secure = stack.enter_context(client(authority).wrap_socket(sock))
            ended = (
                closed_within(secure, 4)
                if stage == "tls-then-silent"
                else trickle(secure, hello_frame(), 0.02, 4)
            )
            assert ended
        monkeypatch.setattr(tls, "HANDSHAKE_S", 10)
        monkeypatch.setattr(channel, "HANDSHAKE_S", 10)
        serve_one(pair, 1)


def test_a_decode_worker_gives_up_a_listener_that_trickles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dialing side is bounded as well: the request fails with a reason."""
    monkeypatch.setattr(channel, "HANDSHAKE_S", 0.4)
    with closing(Pair()) as pair, socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(WAIT_S)
        pair.address = server.getsockname()[:2]
        pair.begin(1, [1], state=0, aux=0)
        sock, _ = server.accept()
        with sock:
            assert trickle(sock, hello_frame(), 0.02, 4)
        assert "too slow" in pair.decode.wait(1, "failed")


def test_refusals_are_counted_by_reason(ours: Signer) -> None:
    """The metric has the word that the table in docs/operations.md has."""
    contexts = {"prefill_tls": ours.issue("A"), "decode_tls": ours.issue("B")}
    with closing(Pair(**contexts, prefill_peers=("X",))) as pair:
        pair.begin(1, [1], state=0, aux=0)
        pair.decode.wait(1, "failed")
        pair.prefill.wait(NO_ROOM, "refused site")  # it tells its peer first, then counts
        text = telemetry.generate_latest(pair.prefill.telemetry.registry).decode()
        assert 'prfaas_transfer_refused_peers_total{reason="site"' in text
