"""The sweep behind the precision law: small decoders trained on real text, then rounded."""
