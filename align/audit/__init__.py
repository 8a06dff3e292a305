"""What a pair of tokenizers would meet, before a GPU is spent on it: `distill align`."""
