"""`prfaas certs`: a private authority, and a certificate with its key for each site.

What `transfer/tls.py` checks is what is made here: ECDSA P-256, signed by the one authority, the site's name
as a DNS entry. A key is never readable by others, not even while it is written; nothing is ever overwritten.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cache_service.core.errors import ConfigError
from cache_service.core.ids import parse_name

CA_DAYS = 3650
SITE_DAYS = 365
#: Clocks of two sites may differ by this much.
SKEW = datetime.timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class SiteFiles:
    """Where the PEM files of one site are."""

    ca: Path
    cert: Path
    key: Path


def files_of(folder: Path, site: str) -> SiteFiles:
    """Return the paths that a site's files have in a folder."""
    return SiteFiles(folder / "ca.pem", folder / f"{site}.pem", folder / f"{site}.key")


def make(folder: Path, sites: Sequence[str], *, days: int = SITE_DAYS, keep_ca_key: bool = True) -> None:
    """Write ca.pem, ca.key and, per site, SITE.pem and SITE.key.

    An authority that is in the folder already signs the new certificates, so that sites can be added.

    Args:
        folder: made when it is not there.
        sites: names, as the workers' configurations have them.
        days: for how long the sites' certificates are good.
        keep_ca_key: False throws the authority's key away: nobody can sign another certificate.

    Raises ConfigError for a wrong name or number, a file that is there already, a folder that cannot be
    written, and an authority that cannot be used.
    """
    _check(sites, days)
    ca_path, ca_key_path = folder / "ca.pem", folder / "ca.key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for site in sites:
            found = [p for p in (files_of(folder, site).cert, files_of(folder, site).key) if p.exists()]
            if found:
                raise ConfigError(f"--sites: {found[0]} is there already; move it away to make another one")
        if ca_path.exists() or ca_key_path.exists():
            ca, ca_key = _load_authority(ca_path, ca_key_path)
        else:
            ca, ca_key = _new_authority()
            if keep_ca_key:
                _write_key(ca_key_path, ca_key)
            _write(ca_path, ca.public_bytes(serialization.Encoding.PEM), 0o644)
        for site in sites:
            cert, key = _issue(site, ca, ca_key, days)
            _write_key(files_of(folder, site).key, key)
            _write(files_of(folder, site).cert, cert.public_bytes(serialization.Encoding.PEM), 0o644)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write certificates: {error.strerror}") from error


def remove(folder: Path, sites: Sequence[str]) -> None:
    """Delete what `make` would write for these sites; the rest of the folder stays."""
    paths = [folder / "ca.pem", folder / "ca.key"]
    for site in sites:
        paths += [files_of(folder, site).cert, files_of(folder, site).key]
    for path in paths:
        with suppress(FileNotFoundError):
            path.unlink()


def _check(sites: Sequence[str], days: int) -> None:
    if not sites:
        raise ConfigError("--sites: is empty; give the sites' names, for example A,B")
    seen: dict[str, str] = {}
    for site in sites:
        parse_name(site, field="--sites")
        if site.lower() == "ca":
            raise ConfigError(f"--sites: {site!r} would have the authority's file names")
        if site.lower() in seen:
            # DNS names have no case: either certificate would speak for both
            raise ConfigError(f"--sites: {site!r} and {seen[site.lower()]!r} are the same to a certificate")
        seen[site.lower()] = site
    if not 1 <= days <= CA_DAYS:
        raise ConfigError(f"--days: {days} is not in 1..{CA_DAYS}")


def _builder(
    subject: str, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _new_authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = f"prfaas authority {os.urandom(4).hex()}"
    ca = (
        _builder(name, _name(name), key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return ca, key


def _load_authority(ca_path: Path, key_path: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    for path in (ca_path, key_path):
        if not path.exists():
            raise ConfigError(f"{path}: is missing, the other half of the authority is there; bring it back")
    try:
        ca = x509.load_pem_x509_certificate(ca_path.read_bytes())
        key = serialization.load_pem_private_key(key_path.read_bytes(), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{ca_path}, {key_path}: cannot be used: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != ca.public_key():
        raise ConfigError(f"{key_path}: is not the key of {ca_path}")
    return ca, key


def _issue(
    site: str, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, days: int
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    both_ways = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    cert = (
        _builder(site, ca.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(site)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(both_ways), critical=False)
        .add_extension(signer, critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return cert, key


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, pem, 0o600)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Make a file with these rights from the start; one that is there already is an error."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
