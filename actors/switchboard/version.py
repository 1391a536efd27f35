"""What this program calls itself towards peers."""

from importlib.metadata import PackageNotFoundError, version

try:
    AGENT = f"peerup/{version('peerup')}"
except PackageNotFoundError:  # run from a source tree that was never installed
    AGENT = "peerup"
