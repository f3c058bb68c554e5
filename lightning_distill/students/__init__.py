"""What any-step students take along: these files are copied into every exported pipeline.

They import torch, diffusers, transformers and peft, and each other by relative imports, so that they run without this package.
The folder is flat because diffusers puts the code of a pipeline into one flat folder.
"""
