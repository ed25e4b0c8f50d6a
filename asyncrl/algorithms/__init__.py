"""Algorithms: a page each, of a config, a loss as a pure function, and an update."""
