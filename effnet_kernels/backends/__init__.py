"""What computes: the primitives of each backend, and which backend runs."""
