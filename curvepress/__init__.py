"""curvepress."""
