"""The backends: the primitives of each, and the choice between them."""
