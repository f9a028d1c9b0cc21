"""Methods that isolate parameters: what answers for old structures never changes."""
