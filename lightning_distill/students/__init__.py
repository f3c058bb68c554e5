"""Code of any-step students: every exported pipeline contains a copy of these files.

They import only torch, diffusers, transformers, peft and accelerate, and each other by relative imports, so that they run
without this package. The folder is flat because diffusers stores the code of a pipeline in one flat folder.
"""
