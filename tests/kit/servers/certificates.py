"""An authority of a job's own and certificates of its nodes, made with ``openssl`` as a user
would."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
OPENSSL_S = 60.0


@dataclass(frozen=True)
class Files:
    """The paths of one node's certificate, its key, and the authority that signed it."""

    cert: Path
    key: Path
    ca: Path

    def spec(self) -> dict[str, str]:
        """As a launcher says it."""
        return {"tls_cert": str(self.cert), "tls_key": str(self.key), "tls_ca": str(self.ca)}


def require() -> None:
    """Skips the test where there is no openssl; in CI that is a failure."""
    if shutil.which("openssl") is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "openssl is not installed (Debian: apt-get install openssl)"
        )


class Authority:
    """One authority, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        require()
        folder.mkdir(parents=True)
        self._folder = folder
        self.file = folder / "ca.pem"
        self._openssl(
            "req",
            "-x509",
            *_KEY,
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "2",
            "-subj",
            f"/CN={folder.name}",
            "-addext",
            "keyUsage=critical,keyCertSign",
        )

    def sign(self, name: str, *hosts: str, usage: str = "serverAuth,clientAuth") -> Files:
        """A certificate that names these addresses or names of DNS, or loopback."""
        names = ",".join(_named(host) for host in hosts or ("127.0.0.1",))
        (self._folder / f"{name}.ext").write_text(
            f"subjectAltName={names}\nextendedKeyUsage={usage}\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        self._openssl(
            "req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}"
        )
        self._openssl(
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            f"{name}.ext",
            "-out",
            f"{name}.pem",
        )
        return Files(self._folder / f"{name}.pem", self._folder / f"{name}.key", self.file)

    def encrypt(self, files: Files, password: str) -> Files:
        """The same with a key that takes a password."""
        path = files.key.with_suffix(".locked")
        self._openssl(
            "ec",
            "-in",
            str(files.key),
            "-aes256",
            "-passout",
            f"pass:{password}",
            "-out",
            str(path),
        )
        return Files(files.cert, path, files.ca)

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments],
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=OPENSSL_S,
            check=False,
        )
        assert done.returncode == 0, f"openssl {' '.join(arguments)}\n{done.stderr}"


def _named(host: str) -> str:
    """As ``subjectAltName`` has it."""
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"
