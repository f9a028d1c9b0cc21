"""The Universal Model with other heads: one-hot vectors, and the first version's shared head."""
