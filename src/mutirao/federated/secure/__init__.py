"""Secure aggregation: the server learns the sum of the sites' updates and no single one.

Our own implementation of the protocol of Bonawitz et al. 2017 (arXiv:1611.04482; in full
at CCS'17, doi:10.1145/3133956.3133982), in its variant against a server that lies. It is
plain protocol code over bytes: numpy and ``cryptography``, no Flower, HTTP or PyTorch.

    terms        what everyone agrees on; what a site insists on
    fixed_point  floats as integers that cannot overflow when they are added
    wire         header, bounded reader
    messages     what travels, one dataclass for each kind
    derivation   HKDF-SHA256: every key from a secret and a label
    keys         Ed25519 identities, X25519 keys of one round
    agreement    what the signatures say, and who checks what
    shares       Shamir's secret sharing
    sealing      a pair of shares, encrypted for one site
    masks        ChaCha20 key streams as integers, at any offset
    payload      one update, fixed by its hashes
    site         a site's state machine
    register     a site's rounds: one set of terms and one update for each
    server       the server's state machine
    unmasking    the server's last step: which masks to take off

``site.session`` and ``coordinator.secure_round`` call it.
``docs/explanation/secure-aggregation.md`` tells the protocol, what it does not protect, and what
it costs.
"""
