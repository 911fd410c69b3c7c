"""Identities and round keys."""

import pytest

from mutirao.errors import ProtocolError
from mutirao.federated.secure.keys import Identity, RoundKey, verify_signature


def test_a_signature_is_for_one_purpose_and_content():
    identity = Identity.generate("north")
    public, signature = identity.public_bytes, identity.sign(b"label", b"x", b"y")
    assert verify_signature(public, signature, b"label", b"x", b"y")
    assert not verify_signature(public, signature, b"other", b"x", b"y")
    assert not verify_signature(public, signature, b"label", b"xy")
    assert not verify_signature(public, bytes(64), b"label", b"x", b"y")
    assert not verify_signature(public, b"", b"label", b"x", b"y")
    assert not verify_signature(Identity.generate("n").public_bytes, signature, b"label", b"x")
    assert not verify_signature(b"short", signature, b"label", b"x", b"y")


def test_two_sites_agree():
    ours, theirs = RoundKey(b"a" * 32), RoundKey(b"b" * 32)
    assert ours.agree(theirs.public_bytes, "t") == theirs.agree(ours.public_bytes, "o")
    assert ours.agree(theirs.public_bytes, "t") != ours.agree(ours.public_bytes, "o")


def test_agreement_is_x25519():
    """RFC 7748, section 6.1."""
    alice = RoundKey(
        bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    )
    bob_public = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    secret = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert alice.agree(bytes.fromhex(bob_public), "bob").hex() == secret


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"\xed" + b"\xff" * 30 + b"\x7f"])
def test_keys_of_low_order_are_refused(key):
    with pytest.raises(ProtocolError, match="site south advertised a key"):
        RoundKey(b"a" * 32).agree(key, "south")
