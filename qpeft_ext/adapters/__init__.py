"""The trained modules: clues, the generated LoRA, the soft prompt; and their files."""
