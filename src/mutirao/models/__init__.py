"""Language models on one device, and the protocol through which other parts see them."""
