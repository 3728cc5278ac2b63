"""Shared helpers: fake models and servers, broken files, comparisons."""
