"""A certificate authority for the tests, made with the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from prfaas_sglang.transfer.tls import Tls, TlsFiles


class Authority:
    """A certificate authority made with openssl, and certificates of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self.ca, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        self._openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", str(self._key), "-out", str(self.ca), "-days", "2", "-subj", f"/CN={name}"),
        )

    def issue(self, site: str) -> Tls:
        """Return contexts with a certificate for a site."""
        return Tls(self.files(site))

    def files(self, site: str) -> TlsFiles:
        """Make a certificate for a site; return the paths."""
        stem = self._folder / f"{self.ca.stem}-{site}"
        key, request, cert = (str(stem) + suffix for suffix in (".key", ".csr", ".crt"))
        names = stem.with_suffix(".ext")
        names.write_text(f"subjectAltName=DNS:{site}\n")
        self._openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", request, "-subj", f"/CN=worker-{site}"),
        )
        self._openssl(
            *("x509", "-req", "-in", request, "-CA", str(self.ca), "-CAkey", str(self._key)),
            *("-CAcreateserial", "-days", "2", "-out", cert, "-extfile", str(names)),
        )
        return TlsFiles(str(self.ca), cert, key)

    @staticmethod
    def _openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
