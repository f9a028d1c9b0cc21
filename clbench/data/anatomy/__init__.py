"""What a body looks like in a CT: its midline, and where its organs lie."""
