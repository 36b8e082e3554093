"""Mutual TLS on the data connections: bit-exact, and nobody without the right certificate gets in."""

from __future__ import annotations

import random
import socket
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cache_service.core.errors import ConfigError
from prfaas_sglang.transfer.tls import Tls, TlsFiles
from tests.integration.authority import Authority
from tests.integration.transfer_support import WAIT_S, Pair, assert_moved


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ours")


def test_transfers_over_tls_are_bit_exact(authority: Authority) -> None:
    """Several rooms over four connections, in chunks of scattered pages."""
    rng = random.Random(5)
    with closing(Pair(prefill_tls=authority.issue("A"), decode_tls=authority.issue("B"))) as pair:
        pages_out, pages_in = rng.sample(range(512), 400), rng.sample(range(512), 400)
        for room in range(4):
            part = slice(room * 100, room * 100 + 100)
            pair.begin(room, pages_in[part], state=room, aux=room)
            pair.prefill.wait(room, "grant")
            pair.exporter.send(room, pages_out[part][:37])
            pair.exporter.send(room, pages_out[part][37:], states=[[8 + room]], aux_row=4 + room, last=True)
        for room in range(4):
            part = slice(room * 100, room * 100 + 100)
            pair.decode.wait(room, "done")
            pair.prefill.wait(room, "done")
            source = [pages_out[part], [8 + room], [4 + room]]
            assert_moved(pair, source, [pages_in[part], [room], [room]])


def test_a_certificate_for_another_site_is_refused(authority: Authority) -> None:
    """The decode worker says it is site B with a certificate for C."""
    with closing(Pair(prefill_tls=authority.issue("A"), decode_tls=authority.issue("C"))) as pair:
        pair.begin(1, [1], state=0, aux=0)
        reason = pair.decode.wait(1, "failed")
        assert "site 'B'" in reason
        assert pair.exporter.grant(1) is None


def test_a_prefill_worker_with_another_site_is_refused(authority: Authority) -> None:
    """The prefill worker says it is site A with a certificate for C: decode grants it nothing."""
    with closing(Pair(prefill_tls=authority.issue("C"), decode_tls=authority.issue("B"))) as pair:
        pair.begin(1, [1], state=0, aux=0)
        assert "site 'A'" in pair.decode.wait(1, "failed")


def test_another_authority_is_refused(authority: Authority, tmp_path: Path) -> None:
    """A certificate that nobody we know has signed: the handshake fails, in either direction."""
    stranger = Authority(tmp_path, "theirs")
    for prefill, decode in ((authority, stranger), (stranger, authority)):
        with closing(Pair(prefill_tls=prefill.issue("A"), decode_tls=decode.issue("B"))) as pair:
            pair.begin(1, [1], state=0, aux=0)
            assert pair.decode.wait(1, "failed")
            assert pair.exporter.grant(1) is None


@pytest.mark.parametrize("plain_side", ["prefill", "decode"])
def test_plain_and_tls_do_not_mix(authority: Authority, plain_side: str) -> None:
    """A side without TLS never exchanges a row with one that has it."""
    tls = {
        "prefill_tls": None if plain_side == "prefill" else authority.issue("A"),
        "decode_tls": None if plain_side == "decode" else authority.issue("B"),
    }
    with closing(Pair(**tls)) as pair:
        pair.begin(1, [1], state=0, aux=0)
        assert pair.decode.wait(1, "failed")
        assert pair.exporter.grant(1) is None


def test_garbage_instead_of_a_handshake_is_refused(authority: Authority) -> None:
    """Bytes that are no TLS close that connection; a real peer is served after it."""
    with closing(Pair(prefill_tls=authority.issue("A"), decode_tls=authority.issue("B"))) as pair:
        with socket.create_connection(pair.address, timeout=WAIT_S) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionResetError):
                while stranger.recv(65536):
                    pass
        pair.begin(1, [3], state=0, aux=0)
        pair.prefill.wait(1, "grant")
        pair.exporter.send(1, [4], states=[[1]], aux_row=1, last=True)
        pair.decode.wait(1, "done")


def test_unusable_files_are_named(tmp_path: Path) -> None:
    """A missing or wrong PEM file is a configuration error that names the setting."""
    with pytest.raises(ConfigError, match=r"tls\.ca: /nowhere"):
        Tls(TlsFiles("/nowhere", "/nowhere", "/nowhere"))
    authority = Authority(tmp_path, "x")
    with pytest.raises(ConfigError, match=r"tls\.cert, tls\.key"):
        Tls(TlsFiles(str(authority.ca), str(authority.ca), str(authority.ca)))
