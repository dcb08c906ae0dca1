"""The networks: their class, the table of the released ones, and what makes them."""
