"""The studio: a page on which to try a steered model, see where features fire, and choose and keep a plan."""
