"""`flash_attention()` inside other people's code: sdpa.py in place of PyTorch's own function, hugging_face.py in transformers."""
