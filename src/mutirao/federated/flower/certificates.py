"""The coordinator's certificates, and the keys by which it knows nodes.

A federation has its own certificate authority, which signs one certificate: that of the
coordinator's SuperLink. A site gets the authority's certificate with its invite and trusts no
other. Node keys are what Flower wants (EC P-384; a node signs each call's time stamp with it):
they say who may connect. Who a site is, its Ed25519 key says (``identity``).

All private keys are PEM files without passphrase, readable by their owner alone, and never
written over. Left out: revoking a certificate; make new ones in another folder instead.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mutirao.errors import InputError, explain_disk_errors

CA_CERTIFICATE = "ca.crt"
CA_KEY = "ca.key"
SERVER_CERTIFICATE = "server.crt"
SERVER_KEY = "server.key"
ALWAYS = ("localhost", "127.0.0.1", "::1")
"""Names of this machine, under which the SuperLink's own helpers reach it."""
DAYS = 397
"""Validity of both certificates: the longest that browsers take for a server's."""
_READABLE_BY_OTHERS = 0o077


@dataclass(frozen=True)
class Certificates:
    """The four files of a coordinator."""

    folder: Path

    @property
    def ca(self) -> Path:
        """Certificate of the authority; goes to the sites."""
        return self.folder / CA_CERTIFICATE

    @property
    def server(self) -> Path:
        """Certificate of the SuperLink."""
        return self.folder / SERVER_CERTIFICATE

    @property
    def server_key(self) -> Path:
        """Private key of the SuperLink."""
        return self.folder / SERVER_KEY


def make_certificates(
    folder: Path, hosts: Sequence[str], *, days: int = DAYS, now: datetime.datetime | None = None
) -> Certificates:
    """Make a certificate authority and a server certificate.

    Args:
        folder: made if need be; holds all four files.
        hosts: names and IP addresses under which sites reach the coordinator.
        days: how long both are valid.
        now: their first moment; the present by default.

    Raises:
        InputError: the folder has such files already, or a host is no name and no address.
        DiskFullError: no room.
    """
    names = _subject_names(hosts)
    start = now or datetime.datetime.now(datetime.UTC)
    end = start + datetime.timedelta(days=days)
    start -= datetime.timedelta(minutes=5)  # sites' clocks may be a little behind
    with explain_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CA_KEY, CA_CERTIFICATE, SERVER_KEY, SERVER_CERTIFICATE):
            if os.path.lexists(folder / name):
                raise InputError(
                    f"{folder / name} exists, and a key is never written over; name another "
                    "folder, or go on with these certificates"
                )
        ca_key, server_key = _new_key(), _new_key()
        issuer = _name("Mutirão federation authority")
        authority = (
            _builder(issuer, issuer, ca_key, start, end)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(certificates=True), critical=True)
            .add_extension(_identifier(ca_key), critical=False)
            .sign(ca_key, hashes.SHA384())
        )
        server = (
            _builder(_name(hosts[0] if hosts else ALWAYS[0]), issuer, server_key, start, end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(_usage(certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(_identifier(server_key), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
            .sign(ca_key, hashes.SHA384())
        )
        write_private(folder / CA_KEY, _private_pem(ca_key))
        write_private(folder / CA_CERTIFICATE, authority.public_bytes(Encoding.PEM))
        write_private(folder / SERVER_KEY, _private_pem(server_key))
        write_private(folder / SERVER_CERTIFICATE, server.public_bytes(Encoding.PEM))
    return Certificates(folder)


def open_certificates(folder: Path) -> Certificates:
    """Return the certificates of a folder.

    Raises:
        InputError: one is missing, or a key can be read by others.
    """
    found = Certificates(folder)
    for path in (found.ca, found.server, found.server_key):
        if not path.is_file():
            raise InputError(
                f"{path} is missing; `mutirao federate keys --coordinator {folder} --host NAME` "
                "makes it"
            )
    _refuse_readable(found.server_key)
    return found


def open_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Return the node key of a file, made on first use.

    Raises:
        InputError: the file is no such key, or can be read by others.
    """
    if not path.exists():
        write_private(path, _private_pem(_new_key()))
    _refuse_readable(path)
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path} is not an EC private key in PEM, without a passphrase")
    return key


def node_key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a node's private key as text."""
    return _private_pem(key).decode()


def node_public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a node's public key in the form in which Flower registers it."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def write_private(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read, not even for a moment others.

    Raises:
        InputError: the file exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise InputError(f"{path} exists, and a key is never written over") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _refuse_readable(path: Path) -> None:
    mode = path.stat().st_mode
    if mode & _READABLE_BY_OTHERS:
        raise InputError(
            f"the private key {path} can be read by others (mode {mode & 0o777:04o}); if nobody "
            f"has: chmod 600 {path}"
        )


def _subject_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys((*hosts, *ALWAYS)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            is_name = host and all(each.isalnum() or each in "-._" for each in host)
            if not (is_name and host.isascii()):
                raise InputError(
                    f"{host!r} is neither a host name nor an IP address (give it without port)"
                ) from None
            names.append(x509.DNSName(host))
    return names


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    start: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _identifier(key: ec.EllipticCurvePrivateKey) -> x509.SubjectKeyIdentifier:
    return x509.SubjectKeyIdentifier.from_public_key(key.public_key())


def _usage(*, certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not certificates,
        key_cert_sign=certificates,
        crl_sign=certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
