"""A user's task and the folder of its run: recipes, artifacts, settings, and what is done already."""
