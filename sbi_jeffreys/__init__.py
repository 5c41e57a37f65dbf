"""Neural posterior estimation with the adaptive constrained Jeffreys objective."""

from sbi_jeffreys.version import __version__

__all__ = ["__version__"]
