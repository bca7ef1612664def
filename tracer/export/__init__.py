"""Traces in forms that other programs read."""
