"""Dark Experience Replay: stored cases with the logits that the model of their time gave them."""
