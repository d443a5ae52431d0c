"""The HTTP service (extra `[serve]`): `copydesk serve`."""
