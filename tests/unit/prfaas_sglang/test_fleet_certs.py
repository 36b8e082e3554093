"""`prfaas certs`: what is written, with which rights, and that nothing is overwritten."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cache_service.core.errors import ConfigError
from prfaas_sglang import cli
from prfaas_sglang.fleet import certs


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_command_writes_an_authority_and_a_certificate_per_site(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """P-256, a year for sites, the site as the only DNS name, keys that nobody else can read."""
    folder = tmp_path / "deep" / "pki"
    assert cli.main(["certs", str(folder), "--sites", "A, B"]) == 0
    assert f"site A: {folder}/ca.pem {folder}/A.pem {folder}/A.key" in capsys.readouterr().out
    assert set(contents(folder)) == {"ca.pem", "ca.key", "A.pem", "A.key", "B.pem", "B.key"}
    ca = load(folder / "ca.pem")
    for site in ("A", "B"):
        cert = load(folder / f"{site}.pem")
        cert.verify_directly_issued_by(ca)
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [site]
        assert not cert.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        key = cert.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert key.curve.name == "secp256r1"
        life = cert.not_valid_after_utc - cert.not_valid_before_utc
        assert life == datetime.timedelta(days=365) + certs.SKEW
    for name in ("ca.key", "A.key", "B.key"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_nothing_is_overwritten_and_sites_can_be_added(tmp_path: Path) -> None:
    """A site that is there is refused before anything is written; a new one gets the same authority's."""
    certs.make(tmp_path, ["A"])
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"A\.pem is there already; move it away"):
        certs.make(tmp_path, ["C", "A"])
    assert contents(tmp_path) == before
    certs.make(tmp_path, ["C"], days=7)
    load(tmp_path / "C.pem").verify_directly_issued_by(load(tmp_path / "ca.pem"))
    assert {name: contents(tmp_path)[name] for name in before} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "ca.key").unlink(), "ca.key: is missing"),
        (lambda folder: (folder / "ca.pem").unlink(), "ca.pem: is missing"),
        (lambda folder: (folder / "ca.pem").write_text("x"), "cannot be used"),
        (lambda folder: (folder / "A.key").rename(folder / "ca.key"), "ca.key: is not the key of"),
    ],
)
def test_half_an_authority_is_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    """It is neither used nor replaced."""
    certs.make(tmp_path, ["A"])
    change(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=message):
        certs.make(tmp_path, ["B"])
    assert contents(tmp_path) == before


def test_an_authority_can_be_made_that_signs_nothing_more(tmp_path: Path) -> None:
    """As the launcher does at each start; its files can be replaced, others stay."""
    certs.make(tmp_path, ["A", "B"], keep_ca_key=False)
    first = (tmp_path / "ca.pem").read_bytes()
    assert not (tmp_path / "ca.key").exists()
    (tmp_path / "notes").write_text("mine")
    certs.remove(tmp_path, ["A", "B"])
    assert set(contents(tmp_path)) == {"notes"}
    certs.make(tmp_path, ["A", "B"], keep_ca_key=False)
    assert (tmp_path / "ca.pem").read_bytes() != first
