"""The decoder, its cache, and its weights in Hugging Face folders."""
