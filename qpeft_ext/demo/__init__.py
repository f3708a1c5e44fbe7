"""The demo: search in your own Python environment, with a small base LM that the project trains itself."""
