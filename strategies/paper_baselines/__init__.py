"""LwF, ILT and PLOP as the benchmark paper's Tables 10 and 11 ran them."""
