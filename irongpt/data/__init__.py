"""Text, its tokenizer, and the batches that are cut from it."""
