"""DiffusionGemma: config, tensor names, metadata, vision."""
