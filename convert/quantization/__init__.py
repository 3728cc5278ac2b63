"""Quantization: recipes, the type of each tensor, sizes, imatrix files, padding."""
