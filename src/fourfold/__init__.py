"""fourfold: a BF16 Mixture-of-Experts checkpoint in, a published int4 release out."""

__version__ = "0.1.0"
