"""Sources, tokenizers, the token cache, packing and sampling."""
