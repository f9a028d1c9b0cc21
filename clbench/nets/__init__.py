"""Networks: backbones, heads, text encodings."""
