"""`python -m clampdown`."""

from clampdown.cli import main

main()
