"""``python -m nicefast``, which is also what torchrun takes: ``torchrun -m nicefast fit ...``."""

from .cli import main

if __name__ == "__main__":
    main()
