"""Published: the numbers printed in the paper, as printed."""
