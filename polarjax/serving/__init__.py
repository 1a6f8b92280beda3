"""A server with OpenAI's HTTP interface on top of an engine; needs the extra `serve`."""
