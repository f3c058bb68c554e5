"""`python -m lightning_distill`."""

from lightning_distill.cli import main

if __name__ == "__main__":
    main()
