"""``effnet train``: recipes, data and a LightningModule around the network. It needs the extra ``train``."""
