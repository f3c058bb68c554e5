"""Command line `lightning-distill`: one module per subcommand, and the table of them in `main.SUBCOMMANDS`."""

PROGRAM = "lightning-distill"
