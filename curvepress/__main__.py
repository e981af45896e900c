"""``python -m curvepress``, which torchrun needs."""

from .cli import main

main()
