"""Training examples: pictures with captions, and their latents."""
