"""Which dimensions of a model must change together: one watched forward pass, read by an algebra of labels."""
