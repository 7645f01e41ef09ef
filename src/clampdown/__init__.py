"""clampdown: find the features that make a language model refuse, steer them, and see what it costs.

Heavy imports (torch, transformers) happen in the subpackages only, so `clampdown --help` is instant.
"""

__version__ = "0.1.0"
