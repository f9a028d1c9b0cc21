"""Data: how it lies on disk, how it is read, cached, cropped; and the embedded phantom."""
