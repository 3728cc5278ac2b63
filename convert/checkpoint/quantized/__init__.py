"""Quantized checkpoints: FP8, NVFP4, MXFP4, packed integers, AWQ, GPTQ, MLX.

What is stored says how a matrix is quantized (names and dtypes of the tensors beside its codes);
``quantization_config`` only adds what they don't say, such as a block's height.
"""
