"""The training text, its tokenizer, and its batches."""
