"""Recipes that guide sampling in another way."""
