"""What an outsider adds to clbench."""
