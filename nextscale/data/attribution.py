"""Whose drawings the shipped systems were trained on. Apart from what reads them, so that telling it is quick."""

ATTRIBUTION = "OpenMoji (https://openmoji.org), CC BY-SA 4.0"
