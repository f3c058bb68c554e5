"""The command line: one file a subcommand, and one table of them."""
