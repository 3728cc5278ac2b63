"""This package's version, as installed."""

from importlib.metadata import PackageNotFoundError, version

# As pip knows us: `pydiffusion` on the package index is another project.
DISTRIBUTION = "pydiffusion-gguf"

try:
    __version__ = version(DISTRIBUTION)
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
