"""freeze(): a trained network as an engine for inference."""
