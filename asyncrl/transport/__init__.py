"""Unrolls one way, weights the other: `ring` and `weights` are pure, `shared_memory` carries."""
