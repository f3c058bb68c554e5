"""Original layouts of transformers: names and fused weights of the authors' code, which other tools read."""
