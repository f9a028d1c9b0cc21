"""A page that shows a test case of a run: image, truth, and the prediction after each step."""
