"""From prices to a plan: families of plans by one price, budgets, and the proven best of small problems."""
