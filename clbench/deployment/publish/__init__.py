"""A model as a folder to publish (safetensors, JSON, Markdown), and such a folder read back."""
