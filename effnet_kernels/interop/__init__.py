"""Other packages' networks: read, accelerated, explained, converted."""
