"""A second architecture, "masked-toy": proof that one costs a config, a tensor map and a line.

A small block-diffusion transformer without experts, with sandwich norms and self-conditioning, whose canvas
begins masked. ``architecture`` and ``tensor_map`` are what the converter needs; ``checkpoint`` makes random
ones; ``reference`` is the model in numpy.
"""
