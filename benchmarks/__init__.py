"""Benchmarks: one course per TOML file, readable aloud; its cases in splits/."""

if __name__ != "clbench.benchmarks":  # the same file must not load twice under two names
    raise ImportError("import this package as clbench.benchmarks")
