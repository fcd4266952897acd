"""Text-to-image diffusion models that can be attributed."""
