"""Weight quantizers beside each other; ``peer_*.py`` run in the peers' own environments."""
