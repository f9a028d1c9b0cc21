"""Strategies: one continual-learning method per file."""

if __name__ != "clbench.strategies":  # the same file must not load twice under two names
    raise ImportError("import this package as clbench.strategies")
