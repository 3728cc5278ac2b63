"""What a generation is made of: batches, streams of text, infill, budgets, saved sessions."""
