"""Make certificates for development: an authority, servers' for localhost (RSA and ECDSA), and a client's.

    python certs/make_certs.py [--force] [DIRECTORY]

DIRECTORY is certs/dev beside this file when it is not given. Files that are there already are kept: it takes --force
to replace them, and then all of them are replaced, since an old certificate is of no use to a new authority.
Needs `cryptography`, which comes with pyOpenSSL. What each file is for: README.rst.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

ORGANIZATION = "ocppgw development"
CHARGE_POINT = "CP1"
"""Common name of the client certificate."""
LOCALHOST = x509.SubjectAlternativeName(
    [
        x509.DNSName("localhost"),
        x509.IPAddress(ip_address("127.0.0.1")),
        x509.IPAddress(ip_address("::1")),
    ]
)
VALID = timedelta(days=825)
"""What Apple's systems accept at most. It begins a day early, for clocks that are late."""


class Authority:
    """Signs certificates with a key of its own, an RSA key: some charge points accept nothing else in a chain."""

    def __init__(self) -> None:
        self.key = _rsa_key()
        self._name = _name("ocppgw development authority")
        usage = _key_usage(key_cert_sign=True, crl_sign=True)
        self.certificate = (
            self._builder(self._name, self.key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self.key, SHA256())
        )

    def issue(self, common_name: str, key: PrivateKey, names: x509.SubjectAlternativeName | None) -> x509.Certificate:
        """Sign a certificate: a server's, who is known by these names, or without any a client's."""
        purpose = ExtendedKeyUsageOID.CLIENT_AUTH if names is None else ExtendedKeyUsageOID.SERVER_AUTH
        # Key encipherment is for the suites with static RSA of the security whitepaper (A00.FR.317).
        usage = _key_usage(digital_signature=True, key_encipherment=isinstance(key, rsa.RSAPrivateKey))
        builder = (
            self._builder(_name(common_name), key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return builder.sign(self.key, SHA256())

    def _builder(self, subject: x509.Name, key: PrivateKey) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        own_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + VALID)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(own_key, critical=False)
        )


def make() -> dict[str, bytes]:
    """Make the content of each file, by its name."""
    authority = Authority()
    made: list[tuple[str, PrivateKey, x509.Certificate]] = [("ca", authority.key, authority.certificate)]
    subjects: list[tuple[str, str, PrivateKey, x509.SubjectAlternativeName | None]] = [
        ("server", "localhost", _rsa_key(), LOCALHOST),
        ("server-ecdsa", "localhost", ec.generate_private_key(ec.SECP256R1()), LOCALHOST),
        ("client", CHARGE_POINT, _rsa_key(), None),
    ]
    for stem, common_name, key, names in subjects:
        made.append((stem, key, authority.issue(common_name, key, names)))
    files = {}
    for stem, key, certificate in made:
        files[f"{stem}.key"] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        files[f"{stem}.pem"] = certificate.public_bytes(Encoding.PEM)
    return files


def write(directory: Path, files: dict[str, bytes], replace: bool) -> None:
    """Write the files; nobody else can read a key. Raises FileExistsError, and leaves all as it is, unless replace."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in files:
        path = directory / name
        if path.exists() and not replace:
            raise FileExistsError(f"{path} is there already; --force replaces it and the others")
    for name, content in files.items():
        path = directory / name
        path.unlink(missing_ok=True)
        mode = 0o600 if name.endswith(".key") else 0o644
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives back the exit status."""
    parser = argparse.ArgumentParser(description="Make certificates for development.")
    parser.add_argument("directory", metavar="DIRECTORY", nargs="?", type=Path, default=Path(__file__).parent / "dev")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args(arguments)
    try:
        write(options.directory, make(), options.force)
    except OSError as error:
        print(f"make_certs: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print(f"{options.directory}: certificates made, valid for {VALID.days} days")  # noqa: T201
    return 0


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _key_usage(**granted: bool) -> x509.KeyUsage:
    usages = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{usage: granted.get(usage, False) for usage in usages})


if __name__ == "__main__":
    sys.exit(main())
