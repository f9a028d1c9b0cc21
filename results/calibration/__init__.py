"""How often the tests of a report are wrong: rates measured on simulated studies, as a CSV file."""
