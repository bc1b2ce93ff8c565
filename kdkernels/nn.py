"""Thin modules over the operators."""
