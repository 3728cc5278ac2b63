"""Version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

# The name on the package index, where `pydiffusion` is another project.
DISTRIBUTION = "pydiffusion-gguf"

try:
    __version__ = version(DISTRIBUTION)
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
