"""How modules become fused chains of convolutions, and how a chain runs, forward and backward."""
