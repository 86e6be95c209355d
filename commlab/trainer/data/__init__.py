"""Text, tokens, and the order in which they are trained on."""
