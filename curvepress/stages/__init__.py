"""The stages of a run: each reads files of the folder, calls the library, and writes files there; and what is said around them."""
