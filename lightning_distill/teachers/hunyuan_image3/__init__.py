"""HunyuanImage 3.0, a teacher that is in neither diffusers nor transformers."""
