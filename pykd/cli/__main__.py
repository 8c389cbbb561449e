"""``python -m pykd.cli``."""

from pykd.cli import main

main()
