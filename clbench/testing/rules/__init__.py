"""The rules of the honesty kit, by what they look at."""
