"""The surface for Python: composing, training, opening, building and comparing from a notebook or a script."""
