"""The one place where a model changes shape: slicing, rewriting, leaving out, and the masked original it is compared with."""
