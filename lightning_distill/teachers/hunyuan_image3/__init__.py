"""Adapter for HunyuanImage 3.0, whose model code is in neither diffusers nor transformers."""
