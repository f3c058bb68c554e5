"""A small stand-in for HunyuanImage 3.0, written for these tests, since the published code cannot be shipped.

It has the published names, call signatures and token layout, in the older and in the newer form of the code, and the traps: a
mixture of experts that asks for a GPU, positions up to the longest sequence in evaluation, an attribute that only `generate`
sets, an autoencoder that decodes in the first process only. It draws nothing sensible: its weights are random.
"""
