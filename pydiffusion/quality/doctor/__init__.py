"""``pydiffusion doctor``: check a GGUF on this machine, and write a page about it."""
