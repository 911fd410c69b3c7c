"""Certificates and node keys: who can read them, whom they name, that none is written over."""

from __future__ import annotations

import datetime
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, uses_nist_ec_curve

from mutirao.errors import InputError
from mutirao.federated.flower.certificates import (
    make_certificates,
    node_public_pem,
    open_certificates,
    open_node_key,
)


def test_all_files_are_for_their_owner_alone(tmp_path):
    made = make_certificates(tmp_path / "keys", ["coordinator.example"])
    open_node_key(tmp_path / "keys" / "node.pem")
    modes = {path.name: path.stat().st_mode & 0o777 for path in made.folder.iterdir()}
    assert len(modes) == 5
    assert set(modes.values()) == {0o600}


def test_the_server_certificate_names_the_hosts_and_this_machine(tmp_path):
    made = make_certificates(tmp_path, ["coordinator.example", "10.1.2.3", "fd00::1"])
    certificate = x509.load_pem_x509_certificate(made.server.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example", "localhost"]
    addresses = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["10.1.2.3", "fd00::1", "127.0.0.1", "::1"]
    assert isinstance(certificate.public_key().curve, ec.SECP384R1)
    days = (certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)).days
    assert 390 <= days <= 397
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.server, made.server_key)


def test_nothing_is_written_over(tmp_path):
    made = make_certificates(tmp_path, ["a.example"])
    before = made.server_key.read_bytes()
    with pytest.raises(InputError, match="never written over"):
        make_certificates(tmp_path, ["a.example"])
    assert made.server_key.read_bytes() == before


@pytest.mark.parametrize("host", ["", "a b", "host:9092", "https://host", "ü.example"])
def test_what_is_no_host_is_refused_before_anything_is_written(tmp_path, host):
    with pytest.raises(InputError, match="neither a host name nor an IP address"):
        make_certificates(tmp_path / "keys", [host])
    assert not (tmp_path / "keys").exists()


def test_a_key_that_others_can_read_is_refused(tmp_path):
    made = make_certificates(tmp_path, ["a.example"])
    made.server_key.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        open_certificates(tmp_path)


def test_missing_certificates_say_how_to_make_them(tmp_path):
    with pytest.raises(InputError, match="mutirao federate keys --coordinator"):
        open_certificates(tmp_path)


def test_a_node_key_is_of_the_kind_that_flower_registers(tmp_path):
    key = open_node_key(tmp_path / "node.pem")
    assert open_node_key(tmp_path / "node.pem").private_numbers() == key.private_numbers()
    assert uses_nist_ec_curve(bytes_to_public_key(node_public_pem(key)))


def test_a_file_that_is_no_node_key_is_refused(tmp_path):
    path = tmp_path / "node.pem"
    path.write_text("nothing")
    path.chmod(0o600)
    with pytest.raises(InputError, match="not an EC private key"):
        open_node_key(path)
