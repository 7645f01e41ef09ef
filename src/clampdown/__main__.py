"""`python -m clampdown`."""

from clampdown.cli.main import main

main()
