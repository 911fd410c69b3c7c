"""Federated training: each site trains on its own data, only updates travel.

Flower is the transport and the process model; everything numeric is ours. Flower is
imported only in ``client_app``, ``server_app`` and ``messages``, and started by
``deployment``; ``site`` and ``strategy``
know nothing of how messages move. May import inference and everything below.

Written and tested, but in no run yet: ``secure`` (secure aggregation), ``codec`` version 2,
``accumulator``, ``outer``, ``robust``, ``compatibility``. Not here: TLS and node keys (this
version runs on loopback only).
"""
