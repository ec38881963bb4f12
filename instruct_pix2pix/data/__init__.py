"""Triples (source image, instruction, edited image): where rows come from, how pairs are cut, in which order."""
