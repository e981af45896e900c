"""``python -m curvepress``, which torchrun needs."""

from .commands.cli import main

main()
