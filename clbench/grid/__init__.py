"""Many runs from one file: what is done, what is shared, what is left, worked off and watched."""
