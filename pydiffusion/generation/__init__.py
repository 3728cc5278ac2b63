"""Parts of the generation loop: batching, streaming, infill, thinking budget, repetition, session files."""
