"""`python -m lightning_distill`, the same program as the console script `lightning-distill`."""

from lightning_distill.commands.main import main

if __name__ == "__main__":
    main()
