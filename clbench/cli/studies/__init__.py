"""Commands over many runs of one strategy or several."""
