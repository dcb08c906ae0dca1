"""Trained weights: their table, download, preprocessing, formats and conversion."""
