"""Model architectures that can be converted, and opening a source of one."""
