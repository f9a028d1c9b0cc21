"""Why a run forgot: where its lost Dice went, and whether the head or the body is to blame."""
