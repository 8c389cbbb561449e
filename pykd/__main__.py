"""``python -m pykd`` is the command ``pykd``."""

from pykd.cli import main

main()
