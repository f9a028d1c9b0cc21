"""More structures for a trained model, from annotated CTs of one's own."""
