"""A small stand-in model for HunyuanImage 3.0, written for these tests because the published code cannot be shipped.

It has the published names, call signatures and token layout, in the older and the newer version of the code. It also has
the published pitfalls:

- The mixture of experts needs a GPU.
- In evaluation mode, positions are computed up to the longest possible sequence.
- Only `generate` sets one of the attributes.
- The autoencoder only decodes in the first process.

The weights are random, so the images are meaningless.
"""
