"""Quality of quantized models: KL divergence over denoising, imatrix collection, plots."""
