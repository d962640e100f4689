"""The code of data: sources, tokenizers, the token cache, packing and sampling."""
