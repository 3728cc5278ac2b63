"""Helpers that several folders share: atomic files, downloads, the version."""
