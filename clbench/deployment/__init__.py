"""A trained model put to use: predicting new CTs, publishing it, looking at what it predicts."""
