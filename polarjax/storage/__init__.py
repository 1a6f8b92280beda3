"""Files, folders and arrays on disk that appear whole or not at all."""
