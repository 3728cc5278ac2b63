"""Supported architectures, and opening a source of one."""
