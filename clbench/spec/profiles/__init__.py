"""Profiles: settings as data, one TOML file each."""
