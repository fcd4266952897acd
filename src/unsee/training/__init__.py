"""A small text-to-image and LoRA trainer."""
