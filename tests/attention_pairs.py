"""Every pair of an attention and a position, found by listing conf/: which are legal, and why the others are not."""

from catalogue import build_piece, options

from llm.errors import ConfigError

GEOMETRY = {"d_model": 48, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
SMALL = {
    "model/attention/vq": {"block_size": 20},
    "model/attention/linear": {"chunk_size": 16},
    "model/attention/performer": {"chunk_size": 16, "num_features": 64},
    "model/position/rerope": {"window": 11},
    "model/position/leaky_rerope": {"window": 11},
    "model/position/inv_leaky": {"window": 11},
}
"""Settings under which a short text already goes through every part of a method."""


def build_pair(attention, position, **settings):
    built = build_piece(
        "model/position", position, head_dim=GEOMETRY["head_dim"], **SMALL.get(f"model/position/{position}", {})
    )
    small = SMALL.get(f"model/attention/{attention}", {})
    return build_piece("model/attention", attention, position=built, layer_index=0, **GEOMETRY, **small, **settings)


def reason_against(attention, position):
    try:
        build_pair(attention, position)
    except ConfigError as error:
        return str(error)
    return None


ALL_PAIRS = [(a, p) for a in options("model/attention") for p in options("model/position")]
LEGAL_PAIRS = [pair for pair in ALL_PAIRS if reason_against(*pair) is None]
ILLEGAL_PAIRS = [pair for pair in ALL_PAIRS if pair not in LEGAL_PAIRS]
