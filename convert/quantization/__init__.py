"""Quantization: recipes, type plan, sizes, imatrix files, padding."""
