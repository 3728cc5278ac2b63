"""DiffusionGemma: config, tensor names, metadata, vocabulary, vision."""
