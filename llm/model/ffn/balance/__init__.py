"""Rules that keep experts evenly used: one of them is `model/ffn/balance`."""
