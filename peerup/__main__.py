"""`python -m peerup`."""

from peerup.cli import main

main()
