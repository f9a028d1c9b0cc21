"""Cost: multiply-adds, parameters, memory and time of models and courses."""
