"""Measurements of peerup, each beside its reference in the same run. `python -m bench --help` says how."""
