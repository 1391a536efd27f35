"""`python -m peerup.cli`."""

from peerup.cli import main

main()
