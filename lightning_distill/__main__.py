"""`python -m lightning_distill`."""

from lightning_distill.commands.main import main

if __name__ == "__main__":
    main()
