"""Shared helpers: atomic file writes, downloads, the package version."""
