"""Measurements behind the figures of the README.  They are not tests: nothing here runs in CI."""
