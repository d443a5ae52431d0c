"""Make a model: the stages and what they share. Run from a checkout."""
