"""What `clbench run`, `score` and `data check` ask of data before it is used."""
