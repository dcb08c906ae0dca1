"""The networks: their class, the table of the released ones, and their builders."""
