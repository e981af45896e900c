"""Least squares in closed form: what survives takes over what was lost, and implants are fitted to what layers see."""
